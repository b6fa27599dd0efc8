"""The learner: DeepSpeed ranks that train the student. `group` is the Ray side, `trainer` one rank's step."""
