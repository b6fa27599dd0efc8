"""The command: files, words, and what goes wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opd_ray import compare
from opd_ray.compare import main
from opd_ray.comparison.tables import Table, as_markdown, as_text
from tests.unit.run_folders import write_after, write_run, write_study

ROOT = Path(__file__).resolve().parents[2]
FAST = ["--resamples", "200"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_study(folder / "runs", {"lsm": 0.5, "lsm_block64": 0.7}, 3)
    write_run(folder / "runs", "lsm", 8, status="failed", folder="<b>broken")
    return folder


@pytest.fixture(scope="module")
def out(study: Path) -> Path:
    main([str(study / "runs"), "--out", str(study / "out"), *FAST])
    return study / "out"


def test_writes_page_markdown_json_and_pictures(out: Path) -> None:
    names = {"comparison.html", "comparison.json", "comparison.md", "comparison.png", "curves-1.png"}
    assert {path.name for path in out.iterdir()} == names
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith("png"))


def test_the_page_holds_everything_and_names_nothing_outside(out: Path) -> None:
    page = (out / "comparison.html").read_text()
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]{1,30})""", page)
    assert len(addresses) == 2 and all(address.startswith("data:image/svg+xml;base64,") for address in addresses)
    assert "<script" not in page and "https://" not in page
    # Names of folders are text, whatever they look like.
    assert "&lt;b&gt;broken" in page and "<b>broken" not in page
    assert '<td class="better">better</td>' in page and "what differs in config" in page


def test_markdown_has_the_same_tables(out: Path) -> None:
    text = (out / "comparison.md").read_text()
    assert "![Scores, and differences to the ungated base](comparison.png)" in text
    assert re.search(r"\| lsm_block64 \| lsm \| avg@8 \| \+\d+\.\d \[.*\| better \|", text)
    for title in ("gate and drift", "time and tokens", "what differs in config", "runs left out", "How to read this"):
        assert f"# {title}\n" in text
    assert "&lt;b>broken" in text and "<b>" not in text


def test_json_has_all_figures(out: Path) -> None:
    found = json.loads((out / "comparison.json").read_text())
    [condition] = found["conditions"]
    score = condition["variants"][1]["scores"]["tiny"]["avg@8"]
    assert sorted(score["by_seed"]) == ["0", "1", "2"] and score["low"] < score["mean"] < score["high"]
    assert [difference["verdict"] for difference in condition["differences"]][1] == "better"
    assert found["format_version"] == 1 and found["left_out"][0]["why"] == "failed: it broke"


def test_again_it_prints_the_same_table_and_replaces_the_older_files_with_the_same(
    study: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = study / "again"
    again.mkdir()
    for name in ("comparison.html", "curves-7.png"):
        (again / name).write_text("old")
    main([str(study / "runs"), "--out", str(again), *FAST])
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in out.iterdir()
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:7] == ["variant", "seeds", "pass@8,", "%", "minus", "base", "verdict"]
    assert lines[2].startswith("lsm_block64") and lines[2].endswith("better")
    assert "1 run left out" in lines
    assert lines[-1] == str(again / "comparison.html")


def test_runs_without_any_evaluation_still_give_a_page(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "lsm", 0)
    main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *FAST])
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "no samples" in page and "no samples of an evaluation" in page
    assert not (tmp_path / "out" / "comparison.png").exists() and (tmp_path / "out" / "curves-1.png").exists()


def test_a_run_without_metrics_gives_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", "lsm", 0)
    (run / "metrics.jsonl").unlink()
    write_after(run, {"tiny": [1, 2], "aime24": [0, 0]})
    main([str(run), "--out", str(tmp_path / "out"), *FAST])
    assert "mean of benchmarks" in (tmp_path / "out" / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no nowhere: give run folders"),
        (["empty"], "no run folder"),
        (["runs", "--out", "runs"], "--out runs holds .*, which would be lost: give a folder of its own"),
        (["runs", "--out", "file"], "--out file is a file: give a folder"),
        (["runs", "--out", "file/below"], "cannot write file/below: Not a directory"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    study: Path, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "runs").symlink_to(study / "runs")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, *FAST])
    error = capsys.readouterr().err
    assert stopped.value.code == 1
    assert re.fullmatch(rf"opd_ray: error: .*{message}.*\n", error), error
    assert sorted(tmp_path.rglob("*")) == before


def test_interrupted_it_leaves_the_older_comparison(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "comparison.json").write_text("old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "score_picture", interrupt)
    with pytest.raises(SystemExit) as stopped:
        main([str(study / "runs"), "--out", str(tmp_path / "out"), *FAST])
    assert stopped.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "comparison.json"]


@pytest.mark.parametrize("text", ["many", "5"])
def test_a_wrong_number_of_resamples_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["runs", "--resamples", text])
    assert stopped.value.code == 2 and "--resamples" in capsys.readouterr().err


def test_needs_no_torch_ray_or_hydra(study: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from opd_ray.compare import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'ray', 'vllm', 'hydra', 'transformers', 'wandb'} & set(sys.modules)))"
    )
    arguments = [str(study / "runs"), "--out", str(tmp_path / "out"), *FAST]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_tables_as_markdown_and_text() -> None:
    table = Table("t", ["name", "|x|"], [["a|b", "1.5"], ["long name", "10"]], [False, True])
    assert as_markdown(table).splitlines() == [
        r"| name | \|x\| |", "|:--|--:|", r"| a\|b | 1.5 |", "| long name | 10 |"
    ]  # fmt: skip
    assert as_text(table).splitlines() == ["name       |x|", "a|b        1.5", "long name   10"]
