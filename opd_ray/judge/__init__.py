"""Judging a student on benchmarks with real engines: the verb `evaluate`, and the evaluation of a training run."""
