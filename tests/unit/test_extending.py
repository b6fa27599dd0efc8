"""The README of `opd_ray/objective`: each file of *Add your own* is added to a copy and run, and the example runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "opd_ray" / "objective" / "README.md").read_text()
FILE = re.compile(
    r"^\*\*A [a-z ]+\*\* is a file in .*?\((\w+)\), here `(\w+)\.py`.*?```python\n(.*?)```", re.DOTALL | re.MULTILINE
)
FILES = {name: (f"opd_ray/objective/{folder}/{name}.py", text) for folder, name, text in FILE.findall(README)}

# The driver knows a new name, and composes and checks a config with it, without torch.
DRIVER = """
import sys
from opd_ray.config.checks import announcements, check_config
from tests.unit.test_config import composed
cfg = composed({overrides})
announcements(cfg)
assert "torch" not in sys.modules
"""

LOSS = """
import torch
from types import SimpleNamespace
from opd_ray.learner.columns import learner_columns
from opd_ray.learner.losses import requested_ids, token_losses
teacher = torch.randn(5, 8).log_softmax(-1)
batch = SimpleNamespace(teacher_topk_logprobs=teacher, support_ids=torch.zeros(5, 8))
assert requested_ids(batch, cfg.objective) is batch.support_ids
assert "teacher_topk_logprobs" in learner_columns(cfg.objective, cfg.gate, probes=False)
values = SimpleNamespace(logits=torch.randn(5, 8, requires_grad=True), logprobs=None)
losses = token_losses(batch, cfg.objective, values, None)
losses.sum().backward()
same = token_losses(batch, cfg.objective, SimpleNamespace(logits=teacher, logprobs=None), None)
print(bool((losses > 0).all()), bool(values.logits.grad.abs().sum() > 0), float(same.abs().max()) < 1e-6)
"""

STATISTIC = """
import torch
from opd_ray.objective import drift_gate
drift, one = torch.tensor([[-11.0, 0.0, 0.0, 0.5]]), torch.ones(1, 4)
gate = drift_gate(drift, torch.zeros(1, 4), one, torch.zeros(1, 4, dtype=torch.int64), tau=1.0,
                  statistic=cfg.gate.statistic, normalize="none")
print(float(gate.segment_drift) == -0.125)
"""

SUPPORT = """
import torch
from dataclasses import dataclass
from opd_ray.learner.microbatch import select_support
from opd_ray.objective import lsm_loss
@dataclass
class Batch:
    support_ids: torch.Tensor
    teacher_topk_logprobs: torch.Tensor
batch = Batch(torch.arange(4)[None], torch.tensor([[0.6, 0.25, 0.1, 0.05]]).log())
teacher = select_support(batch, cfg.teacher.support).teacher_topk_logprobs
student = torch.randn(1, 4, requires_grad=True)
lsm_loss(student, teacher).sum().backward()
print(teacher.isinf().tolist() == [[False, False, False, True]], student.grad[0, 3].item() == 0, cfg.teacher.scored)
"""

CASES = {
    "skew_kl": ("objective.kind=skew_kl", LOSS, "True True True"),
    "clipped_mean": ("gate.statistic=clipped_mean", STATISTIC, "True"),
    "teacher_nucleus": ("teacher.support=teacher_nucleus", SUPPORT, "True True teacher_topk"),
}

BENCHMARK = """
import subprocess, sys
from pathlib import Path
Path("my_problems.jsonl").write_text('{"question": "How much is 1 + 1?", "answer": "2"}\\n')
call = [sys.executable, "-m", "opd_ray.evaluate", "model=tiny:student", "benchmarks=[mine]", "--cfg", "job"]
done = subprocess.run(call, capture_output=True, text=True, timeout=60)
print(done.returncode == 0 and "my_problems.jsonl" in done.stdout)
"""


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


def test_every_file_of_the_readme_has_a_case() -> None:
    assert set(FILES) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_the_readme_is_all_that_an_addition_takes(name: str, tmp_path: Path) -> None:
    path, text = FILES[name]
    override, code, expected = CASES[name]
    folder = copied(tmp_path)
    assert not (folder / path).exists()
    (folder / path).write_text(text)
    assert run(DRIVER.format(overrides=f"'+experiment=lsm_block64', '{override}'") + code, folder) == expected


def test_a_loss_that_does_not_say_what_it_needs_is_refused_in_one_line(tmp_path: Path) -> None:
    path, text = FILES["skew_kl"]
    folder = copied(tmp_path)
    (folder / path).write_text(text.replace('NEEDS = "support_logits"', 'NEEDS = "logits"'))
    call = [sys.executable, "-m", "opd_ray.main", "objective.kind=skew_kl", "runs_dir=runs"]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in (path, "NEEDS='logits'", "support_logits, support_logprobs"))


def test_a_benchmark_of_the_readme_is_one_file(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    text = (ROOT / "opd_ray" / "evaluation" / "README.md").read_text().split("### Your own benchmark")[1]
    block = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[0]
    (folder / "conf" / "benchmark" / "mine.yaml").write_text(block)
    assert run(BENCHMARK, folder) == "True"


def test_the_example_for_other_trainers_runs() -> None:
    (block,) = re.findall(r"```python\n(import torch\n.*?)```", README, flags=re.DOTALL)
    assert (
        run(f"{block}\nprint(bool(hidden.grad.abs().sum() > 0), bool(head.grad.isfinite().all()))", ROOT) == "True True"
    )
