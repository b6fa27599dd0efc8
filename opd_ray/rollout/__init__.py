"""Rollout workers: vLLM engines that sample from the student and load new weights."""
