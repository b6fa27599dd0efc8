from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_ray.comparison.run_samples import read_counts, read_run_samples
from opd_ray.config.choices import AnswerFormat
from opd_ray.errors import DataError
from opd_ray.evaluation import samples as evaluation
from opd_ray.evaluation.grading import GradedSample
from opd_ray.evaluation.samples import SamplesHeader
from opd_ray.evaluation.verdict import Verdict
from tests.unit.run_folders import write_samples


def test_counts_by_benchmark_and_problem(tmp_path: Path) -> None:
    file = tmp_path / "after.parquet"
    write_samples(file, {"tiny": [0, 3, 4], "aime24": [1]}, num_samples=4)
    found = read_counts(file)
    assert list(found) == ["aime24", "tiny"]
    assert found["tiny"].counts == {"tiny-0": (4, 0), "tiny-1": (4, 3), "tiny-2": (4, 4)}
    assert found["tiny"].num_samples == (4, 4) and found["tiny"].mean_tokens == 100
    # Of the five samples that are not right, one has no answer as it was cut.
    assert found["tiny"].truncated_share == pytest.approx(1 / 12)
    assert list(found["tiny"].only(["tiny-2", "tiny-0"]).counts) == ["tiny-2", "tiny-0"]


def test_samples_of_training_and_of_the_evaluate_verb_are_kept_apart(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    write_samples(folder / "after.parquet", {"tiny": [1]})
    write_samples(folder / "before.parquet", {"tiny": [2]})
    write_samples(folder / "step-000040.parquet", {"tiny": [3]})
    write_samples(folder / "student-gsm8k.parquet", {"gsm8k": [4]})
    write_samples(folder / "student-math500.parquet", {"math500": [5]})
    found = read_run_samples(tmp_path)
    assert found.after["tiny"].counts == {"tiny-0": (8, 1)}
    assert sorted(found.student) == ["gsm8k", "math500"]


def test_problems_that_share_an_id_stay_apart(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.parquet", {"tiny": [1, 5]})
    table = pq.read_table(tmp_path / "a.parquet")
    same = table.set_column(1, "problem_id", pa.array(["x"] * table.num_rows))
    pq.write_table(same, tmp_path / "b.parquet")
    assert read_counts(tmp_path / "b.parquet")["tiny"].counts == {"x#0": (8, 1), "x#1": (8, 5)}


def test_reads_what_evaluation_writes(tmp_path: Path) -> None:
    graded = [
        GradedSample("p7", 7, sample, "text", 10 + sample, reason, "42", "42", verdict)
        for sample, (reason, verdict) in enumerate(
            [("stop", Verdict.correct), ("length", Verdict.no_answer), ("stop", Verdict.wrong)]
        )
    ]
    header = SamplesHeader("m", 40, 0.5, 0.9, 256, {"tiny": AnswerFormat.tiny}, 0)
    evaluation.write_samples(tmp_path / "after.parquet", {"tiny": graded}, header)
    found = read_counts(tmp_path / "after.parquet")["tiny"]
    assert found.counts == {"p7": (3, 1)} and found.mean_tokens == 11 and found.truncated_share == pytest.approx(1 / 3)
    assert found.settings == {
        "temperature": "0.5", "top_p": "0.9", "max_response_tokens": "256", "answer_format": "tiny"
    }  # fmt: skip


def test_a_run_without_samples_has_none(tmp_path: Path) -> None:
    found = read_run_samples(tmp_path)
    assert (found.after, found.student) == ({}, {})


def test_an_empty_file_has_no_benchmark(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.parquet", {"tiny": [1]})
    pq.write_table(pq.read_table(tmp_path / "a.parquet").slice(0, 0), tmp_path / "b.parquet")
    assert read_counts(tmp_path / "b.parquet") == {}


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="a.parquet is not a Parquet file of samples"):
        read_counts(tmp_path / "a.parquet")
    pq.write_table(pa.table({"benchmark": ["tiny"]}), tmp_path / "b.parquet")
    with pytest.raises(
        DataError, match="b.parquet has no column finish_reason, num_tokens, problem_id, problem_index, verdict"
    ):
        read_counts(tmp_path / "b.parquet")
