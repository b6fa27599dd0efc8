import os
import subprocess
import sys
from pathlib import Path

import opd_ray.objective as objective

CHECK = """
import sys
import opd_ray.objective
heavy = {"ray", "vllm", "deepspeed", "transformers", "pyarrow", "hydra", "omegaconf"}
print(",".join(sorted(heavy & set(sys.modules))), "torch" in sys.modules)
"""


def test_a_fresh_interpreter_loads_torch_and_no_engine() -> None:
    root = str(Path(objective.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


def test_all_names_are_there_and_documented() -> None:
    for name in objective.__all__:
        value = getattr(objective, name)
        if callable(value) and name not in {"Advantage", "Direction", "Normalize", "Statistic"}:
            assert value.__doc__
