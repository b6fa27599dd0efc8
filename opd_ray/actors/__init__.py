"""Ray actors: groups of workers for rollout, teacher and learner. vllm and deepspeed are imported in workers only."""
