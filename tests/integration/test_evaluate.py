"""The verb `evaluate` as a user types it: real engines in Ray, every sample kept, and Ctrl-C in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from opd_ray.evaluation.samples import read_header, read_samples
from tests.integration.conftest import assert_gone

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
# The embedded tokenizer knows digits, lower-case letters, signs and line ends only.
WORDS = [("p1", "3+4=", "7"), ("p2", "a has 3 and buys 5", "work\n#### 8"), ("p3", "9-2=", "7")]
OPTIONS = ["model=tiny:student", "n=2", "max_response_tokens=64", "template=completion"]


def start(*args: str) -> subprocess.Popen[str]:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "local"}
    return subprocess.Popen(
        [sys.executable, "-m", "opd_ray.evaluate", *args],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts its background jobs deaf to Ctrl-C, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [json.dumps({"id": name, "question": problem, "answer": answer}) for name, problem, answer in WORDS]
    (folder / "gsm8k_test.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def test_two_benchmarks_to_the_end_and_verdicts_made_anew(words: Path, tmp_path: Path) -> None:
    process = start(
        *OPTIONS,
        "benchmarks=[tiny,gsm8k]",
        "benchmark.tiny.num_problems=4",
        f"data_dir={words}",
        f"evaluations_dir={tmp_path}",
    )
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    folder = (tmp_path / "latest").resolve()
    assert sorted(file.suffix for file in folder.iterdir() if file.stem in ("tiny", "gsm8k")) == [".parquet"] * 2
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["benchmarks"]) == ["tiny", "gsm8k"] and summary["n"] == 2
    for name, figures in summary["benchmarks"].items():
        table = read_samples(folder / f"{name}.parquet")
        assert table.num_rows == 2 * figures["num_problems"] > 0
        assert figures["avg_at_2"] == figures["pass_at_1"] <= figures["pass_at_2"]
        assert table["verdict"].to_pylist().count("correct") == round(figures["avg_at_2"] * table.num_rows)
        assert max(table.to_pydict()["num_tokens"]) <= 64
        header = read_header(table, folder)
        assert (header.model, header.top_p, header.max_response_tokens) == ("tiny:student", 0.9, 64)
        assert name in out
    assert [sample for sample in read_samples(folder / "gsm8k.parquet")["reference"].to_pylist()][::2] == [
        "7",
        "8",
        "7",
    ]
    assert "Traceback" not in err and "of 8 answers" in err
    again = start(f"recompute={folder}")
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert "0 of 14 verdicts changed" in out


def test_a_prompt_longer_than_the_context_is_refused_before_an_engine_starts(tmp_path: Path) -> None:
    row = {"problem": "1+" * 2000 + "1=", "answer": "2"}
    (tmp_path / "gsm8k_test.jsonl").write_text(json.dumps(row) + "\n")
    results = tmp_path / "evaluations"
    process = start(*OPTIONS, "benchmarks=[gsm8k]", f"data_dir={tmp_path}", f"evaluations_dir={results}")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and out == ""
    assert "problem 'row-0' has 4" in err and "and the context of" in err and "starting" not in err
    assert not results.exists()


@pytest.mark.slow
def test_ctrl_c_while_engines_sample_leaves_nothing(tmp_path: Path) -> None:
    results = tmp_path / "evaluations"
    process = start(
        "model=tiny:student",
        "benchmarks=[tiny]",
        "benchmark.tiny.num_problems=1000",
        "n=8",
        f"evaluations_dir={results}",
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "sampling" in line:
            break
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err
    assert list(results.iterdir()) == []
    assert_gone(children)
