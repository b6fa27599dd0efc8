"""Losses by the name of `objective.kind`, one module each.

A module declares `NEEDS` (`opd_ray.config.registry.Needs`) as a plain string, and defines ``loss``, which returns the
loss per position `[N]` in nats. On the support it is called as ``loss(student, teacher, cfg)`` with `[N,K]` tensors:
logits or log-probs as `NEEDS` says, and the teacher's log-probs, -inf where an id is not in the support. With
``NEEDS = "sampled_logprobs"`` it is called as ``loss(current, behavior, teacher, cfg)`` with log-probs `[N]` of the
sampled tokens. `NEEDS_RENORMALIZED` takes the place of `NEEDS` where `objective.renormalize` is set.
"""
