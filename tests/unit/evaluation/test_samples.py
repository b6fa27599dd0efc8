import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_ray.config.choices import AnswerFormat
from opd_ray.errors import DataError
from opd_ray.evaluation.grading import GradedSample
from opd_ray.evaluation.samples import (
    SAMPLES_SCHEMA,
    SamplesHeader,
    read_header,
    read_samples,
    to_graded,
    write_samples,
)
from opd_ray.evaluation.verdict import Verdict

HEADER = SamplesHeader(
    model="m",
    policy_version=40,
    temperature=1.0,
    top_p=0.9,
    max_response_tokens=256,
    answer_format={"b": AnswerFormat.tiny, "a": AnswerFormat.boxed},
    seed=3,
)


def graded(index: int, number: int, verdict: Verdict = Verdict.correct) -> GradedSample:
    return GradedSample(f"p{index}", index, number, "so \ud7ff #5", 4, "stop", "5", extracted="5", verdict=verdict)


def test_written_samples_come_back_in_order_with_their_header(tmp_path: Path) -> None:
    none = replace(graded(0, 1, Verdict.no_answer), extracted=None)
    path = write_samples(
        tmp_path / "new" / "x.parquet", {"b": [graded(1, 0), none, graded(0, 0)], "a": [graded(5, 0)]}, HEADER
    )
    table = read_samples(path)
    assert table.schema.equals(SAMPLES_SCHEMA)
    columns = table.to_pydict()
    assert columns["benchmark"] == ["a", "b", "b", "b"]
    assert list(zip(columns["problem_index"], columns["sample"], strict=True)) == [(5, 0), (0, 0), (0, 1), (1, 0)]
    assert columns["verdict"] == ["correct", "correct", "no_answer", "correct"]
    assert read_header(table, path) == HEADER
    assert to_graded(table, path) == {"a": [graded(5, 0)], "b": [graded(0, 0), none, graded(1, 0)]}
    values = json.loads(table.schema.metadata[b"opd_ray"])
    assert values["format_version"] == 1 and values["policy_version"] == 40
    assert values["answer_format"] == {"a": "boxed", "b": "tiny"}
    assert [file.name for file in path.parent.iterdir()] == ["x.parquet"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_samples(tmp_path / "x.parquet", {"b": [graded(0, 0)]}, HEADER)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(DataError, match="x.parquet cannot be written .No space left"):
        write_samples(path, {"b": [graded(1, 0)]}, HEADER)
    assert read_samples(path)["problem_id"].to_pylist() == ["p0"]
    assert [file.name for file in tmp_path.iterdir()] == ["x.parquet"]


def test_what_is_no_file_of_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_samples(tmp_path / "missing.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="cannot be read"):
        read_samples(tmp_path / "damaged.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="does not hold samples"):
        read_samples(tmp_path / "other.parquet")
    pq.write_table(SAMPLES_SCHEMA.empty_table(), tmp_path / "bare.parquet")
    with pytest.raises(DataError, match="does not say how"):
        read_samples(tmp_path / "bare.parquet")
    later = SAMPLES_SCHEMA.with_metadata({b"opd_ray": b'{"format_version": 9}'}).empty_table()
    pq.write_table(later, tmp_path / "later.parquet")
    with pytest.raises(DataError, match="has format 9"):
        read_samples(tmp_path / "later.parquet")
