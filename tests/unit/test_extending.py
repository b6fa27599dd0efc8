"""README's section *Make it yours*: each change is applied as it stands there, to a copy, and run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

OBJECTIVE = """
import torch
from types import SimpleNamespace
from opd_ray.learner.losses import requested_ids, token_losses
from opd_ray.learner.policy_model import HeadValues
from tests.unit.test_config import composed
cfg = composed("objective=skew_kl").objective
teacher = torch.randn(5, 8).log_softmax(-1)
batch = SimpleNamespace(teacher_topk_logprobs=teacher, support_ids=torch.zeros(5, 8))
assert requested_ids(batch, cfg) is batch.support_ids
values = SimpleNamespace(logits=torch.randn(5, 8, requires_grad=True), logprobs=None)
losses = token_losses(batch, cfg, values, None)
losses.sum().backward()
same = token_losses(batch, cfg, SimpleNamespace(logits=teacher, logprobs=None), None)
print(bool((losses > 0).all()), bool(values.logits.grad.abs().sum() > 0), float(same.abs().max()) < 1e-6)
"""

STATISTIC = """
import torch
from opd_ray.objective import drift_gate
from tests.unit.test_config import composed
cfg = composed("+experiment=lsm_block64", "gate.statistic=clipped_mean").gate
drift, one = torch.tensor([[-11.0, 0.0, 0.0, 0.5]]), torch.ones(1, 4)
gate = drift_gate(drift, torch.zeros(1, 4), one, torch.zeros(1, 4, dtype=torch.int64), tau=1.0,
                  statistic=cfg.statistic.name, normalize="none")
print(float(gate.segment_drift) == -0.125)
"""

BENCHMARK = """
import subprocess, sys
from pathlib import Path
Path("my_problems.jsonl").write_text('{"question": "How much is 1 + 1?", "answer": "2"}\\n')
call = [sys.executable, "-m", "opd_ray.evaluate", "model=tiny:student", "benchmarks=[mine]", "--cfg", "job"]
done = subprocess.run(call, capture_output=True, text=True, timeout=60)
print(done.returncode == 0 and "my_problems.jsonl" in done.stdout)
"""


def blocks(language: str) -> list[str]:
    section = (ROOT / "README.md").read_text().split("## Make it yours")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)


def copied(folder: Path) -> Path:
    for name in ("opd_ray", "conf", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("number", "code", "expected"), [(0, OBJECTIVE, "True True True"), (1, STATISTIC, "True")])
def test_a_change_of_the_readme_applies_and_works(number: int, code: str, expected: str, tmp_path: Path) -> None:
    diff = blocks("diff")[number]
    assert sum(line.startswith("+") and not line.startswith("+++") for line in diff.splitlines()) < 30
    folder = copied(tmp_path)
    applied = subprocess.run(["git", "apply", "-"], cwd=folder, input=diff, capture_output=True, text=True, check=False)
    assert applied.returncode == 0, applied.stderr
    assert run(code, folder) == expected


def test_a_benchmark_of_the_readme_is_one_file(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "conf" / "benchmark" / "mine.yaml").write_text(blocks("yaml")[0])
    assert run(BENCHMARK, folder) == "True"
