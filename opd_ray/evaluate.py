"""Judge a model on benchmarks: ``python -m opd_ray.evaluate model=FOLDER benchmarks=[math500,gsm8k] n=8``.

pass@1 to pass@n, avg@n and intervals, with every sample kept as Parquet; ``recompute=FOLDER`` verifies these again.
"""

from __future__ import annotations

from opd_ray.main import Composed, command, register_benchmarks
from opd_ray.training.evaluate_config import EvaluateConfig, check_evaluate_config


def evaluate_model(found: Composed[EvaluateConfig]) -> None:
    """Check the config and do what it says; raises `OpdError`."""
    cfg = found.cfg
    check_evaluate_config(cfg)
    # ray and pyarrow are imported late, so that --help and --cfg job answer at once.
    if cfg.recompute:
        from opd_ray.training.recompute import recompute

        recompute(cfg.recompute, cfg.verification, show_progress=cfg.progress)
    else:
        from opd_ray.training.evaluation_session import run_evaluation

        run_evaluation(cfg, found.yaml)


def main() -> None:
    """Console entry: exit code 0 after a complete evaluation, 1 after an error, 130 after Ctrl-C."""
    register_benchmarks()
    command("evaluate", EvaluateConfig, evaluate_model)


if __name__ == "__main__":
    main()
