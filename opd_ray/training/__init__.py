"""The driver of a run: session, controller, the two loops, preflight; and of an evaluation."""
