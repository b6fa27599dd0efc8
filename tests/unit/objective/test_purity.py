import subprocess
import sys

import opd_ray.objective as objective

CHECK = """
import sys
import opd_ray.objective
heavy = {"ray", "vllm", "deepspeed", "transformers", "pyarrow", "hydra", "omegaconf"}
print(",".join(sorted(heavy & set(sys.modules))), "torch" in sys.modules)
"""


def test_a_fresh_interpreter_loads_torch_and_no_engine() -> None:
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


def test_all_names_are_there_and_documented() -> None:
    for name in objective.__all__:
        value = getattr(objective, name)
        if callable(value) and name not in {"Advantage", "Normalize", "Statistic"}:
            assert value.__doc__
