"""Prompt files: what is read, and what is refused in one clear line."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_ray.data.prompts import read_prompts
from opd_ray.errors import DataError
from opd_ray.types import Prompt

ROWS = [
    {"id": "a", "problem": "1 + 1?", "answer": "2", "solution": "1 + 1 = 2"},
    {"id": "b", "problem": "Größe?", "answer": 7},
    {"id": 3, "problem": "2 + 2?"},
]
EXPECTED = [
    Prompt("a", "1 + 1?", "2", "1 + 1 = 2", index=0),
    Prompt("b", "Größe?", "7", None, index=1),
    Prompt("3", "2 + 2?", None, None, index=2),
]


def write(path: Path, rows: list[Any], newline: str = "\n") -> str:
    path.write_text(newline.join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


def refusal(path: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_prompts(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "ndjson"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"train.{suffix}", ROWS)
    assert read_prompts(path) == EXPECTED
    assert read_prompts(path, limit=2) == EXPECTED[:2]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"problem": "x"}\r\n\r\n{"problem": "y"}\r\n')
    assert [(p.id, p.problem, p.index) for p in read_prompts(str(path))] == [
        ("row-0", "x", 0),
        ("row-1", "y", 1),
    ]


def test_parquet_file_and_folder(tmp_path: Path) -> None:
    columns = {"id": ["a", "b"], "problem": ["x", "y"], "answer": ["1", None], "extra": [1.5, 2.5]}
    pq.write_table(pa.table(columns), tmp_path / "part-1.parquet")
    pq.write_table(pa.table({"id": ["c"], "problem": ["z"]}), tmp_path / "part-2.parquet")
    expected = [Prompt("a", "x", "1", index=0), Prompt("b", "y", index=1), Prompt("c", "z", index=2)]
    assert read_prompts(str(tmp_path / "part-1.parquet")) == expected[:2]
    assert read_prompts(str(tmp_path)) == expected


def test_nested_keys_messages_and_repeated_problems(tmp_path: Path) -> None:
    def row(problem: str, answer: str, number: str) -> dict[str, Any]:
        turns = [
            ("system", "s"),
            ("user", "earlier"),
            ("assistant", "yes"),
            ("user", problem),
            ("assistant", ""),
        ]
        messages = [{"role": role, "content": content} for role, content in turns]
        return {"prompt": messages, "reward_model": {"ground_truth": answer}, "extra_info": {"index": number}}

    rows = [row("p", "1", "n1"), row("p", "1", "n1"), row("q", "2", "n2")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "dapo.parquet")
    fields = {"problem": "prompt", "answer": "reward_model.ground_truth", "id": "extra_info.index"}
    for path in (str(tmp_path / "dapo.parquet"), write(tmp_path / "dapo.jsonl", rows)):
        found = read_prompts(path, fields=fields, unique=True)
        assert found == [Prompt("n1", "p", "1", index=0), Prompt("n2", "q", "2", index=2)]
        assert [p.id for p in read_prompts(path, fields={**fields, "id": ""})] == ["row-0", "row-1", "row-2"]
        assert "id 'n1' was used before" in refusal(path, fields=fields)


def test_unique_takes_the_first_of_rows_with_the_same_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{"id": i, "problem": p} for i, p in enumerate("xyxz")])
    assert [(p.id, p.index) for p in read_prompts(path, unique=True)] == [("0", 0), ("1", 1), ("3", 3)]
    assert len(read_prompts(path)) == 4
    assert [p.id for p in read_prompts(path, limit=3, unique=True)] == ["0", "1", "3"]


def test_a_key_with_a_dot_in_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{"a.b": "flat"}, {"a": {"b": "nested"}}])
    assert [p.problem for p in read_prompts(path, fields={"problem": "a.b"})] == ["flat", "nested"]


def test_the_same_key_may_serve_two_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{"question": "x", "answer": "so 4"}])
    (prompt,) = read_prompts(path, fields={"problem": "question", "answer": "answer", "solution": "answer"})
    assert (prompt.answer, prompt.solution) == ("so 4", "so 4")


@pytest.mark.parametrize(
    ("second_row", "message"),
    [
        ({"id": "b", "question": "x"}, ":2: the row has no 'problem' (keys: id, question)"),
        ({"problem": None}, ":2: the row has no 'problem'"),
        ({"problem": 5}, ":2: 'problem' is a number: give a string"),
        ({"problem": {"text": "x"}}, ":2: 'problem' is an object"),
        ({"problem": " "}, ":2: 'problem' is empty"),
        (
            {"problem": [{"role": "system", "content": "x"}]},
            ":2: 'problem' is a list without a message of role 'user'",
        ),
        ({"problem": [{"role": "user", "content": 5}]}, ":2: 'problem' is a number"),
        ({"problem": "x", "answer": ["4"]}, ":2: 'answer' is a list"),
        ({"problem": "x", "answer": True}, ":2: 'answer' is a truth value"),
        ({"problem": "x", "solution": 4}, ":2: 'solution' is a number"),
        ({"id": "a", "problem": "x"}, ":2: id 'a' was used before, in"),
        (["problem", "x"], ":2: the row is a list"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, second_row: Any, message: str) -> None:
    path = write(tmp_path / "train.jsonl", [ROWS[0], second_row])
    assert f"{path}{message}" in refusal(path)
    assert len(read_prompts(path, limit=1)) == 1  # not reached


def test_a_mapped_field_must_be_there(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{"problem": "x"}])
    assert "no 'final'" in refusal(path, fields={"answer": "final"})
    assert "fields ['anser'] of the prompt data are unknown" in refusal(path, fields={"anser": "final"})
    assert "give the key that holds the problem" in refusal(path, fields={"problem": ""})


def test_missing_columns_of_a_parquet_file_are_named_with_those_seen(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "question": ["x"]}), tmp_path / "train.parquet")
    assert ":1: the row has no 'problem' (keys: id, question)" in refusal(str(tmp_path / "train.parquet"))


def test_unreadable_sources(tmp_path: Path) -> None:
    assert "no such file" in refusal(str(tmp_path / "none.jsonl"))
    assert "has no .parquet file" in refusal(str(tmp_path))
    for content in ("", "\n  \n"):
        (tmp_path / "empty.jsonl").write_text(content)
        assert "no prompts were found" in refusal(str(tmp_path / "empty.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"problem": "x"}\n{"problem": \n')
    assert f"{tmp_path}/bad.jsonl:2: the line is not JSON" in refusal(str(tmp_path / "bad.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes('{"problem": "Größe"}'.encode("latin-1"))
    assert "latin.jsonl:1: the line is not JSON" in refusal(str(tmp_path / "latin.jsonl"))
    (tmp_path / "half.jsonl").write_text('{"problem": "x", "answer": "\\ud800"}')
    assert "half.jsonl:1: 'answer' is not valid Unicode" in refusal(str(tmp_path / "half.jsonl"))
    (tmp_path / "train.parquet").write_text("nonsense")
    assert "cannot be read as parquet" in refusal(str(tmp_path / "train.parquet"))
    (tmp_path / "train.csv").write_text("x")
    assert "suffix '.csv' is unknown" in refusal(str(tmp_path / "train.csv"))
    pq.write_table(pa.table({"problem": pa.array([], pa.utf8())}), tmp_path / "empty.parquet")
    assert "no prompts were found" in refusal(str(tmp_path / "empty.parquet"))


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        calls.append((name, config, split))
        if split == "none":
            raise ValueError("Unknown split 'none'.\nMore about it.")
        return [{"problem": "x"}, {"problem": "y"}]

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    for path in ("hub:me/set", "hub:me/set:test", "hub:me/set:main:test"):
        assert [p.problem for p in read_prompts(path)] == ["x", "y"]
    assert calls == [("me/set", None, "train"), ("me/set", None, "test"), ("me/set", "main", "test")]
    assert "cannot be loaded from the hub (Unknown split 'none'.)" in refusal("hub:me/set:none")
    for path in ("hub:set", "hub:me/set:", "hub:/set", "hub:me/set:a:b:c"):
        assert "not a data set's name" in refusal(path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal("hub:me/set")


def test_the_first_name_that_a_row_has_is_taken(tmp_path: Path) -> None:
    """So that one mapping serves the public GSM8K (question, answer) and files with problem, answer and solution."""
    fields = {"problem": "problem|question", "solution": "solution|answer"}
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"question": "q", "answer": "w #### 1"}\n'
        '{"problem": "p", "question": "other", "answer": "2", "solution": "s"}\n'
    )
    found = read_prompts(str(path), fields=fields)
    assert [(p.problem, p.answer, p.solution) for p in found] == [("q", "w #### 1", "w #### 1"), ("p", "2", "s")]
    path.write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match="has no 'problem' or 'question'"):
        read_prompts(str(path), fields=fields)
