"""Answers through the real verifier: math-verify in processes that can be killed."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from opd_ray.config.choices import AnswerFormat
from opd_ray.errors import VerifierError
from opd_ray.evaluation import verifier, verifier_worker
from opd_ray.evaluation.answers import verdict
from opd_ray.evaluation.grading import Completion, grade, to_samples
from opd_ray.evaluation.verdict import Verdict
from opd_ray.evaluation.verifier import MAX_ANSWER_CHARS, Pair, Verification, verify
from opd_ray.types import Prompt
from tests.unit.benchmark_files import DATA

PATIENT = Verification(num_workers=2, budget_s=20.0)
HASTY = Verification(num_workers=1, budget_s=0.5)


def verdicts(pairs: list[Pair], settings: Verification = PATIENT) -> dict[Pair, Verdict]:
    return asyncio.run(verify(pairs, settings))


def children() -> list[str]:
    """Command lines of verifier workers among the descendants of this process (those of ended ones are empty)."""
    found = psutil.Process().children(recursive=True)
    return [line for line in map(command_line, found) if "verifier_worker" in line]


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # Ended meanwhile, or a zombie that another test's library has not waited for.
        return ""


def test_equal_expressions_are_correct_and_others_are_not() -> None:
    expected = {
        ("2(k+1)", "2k+2"): Verdict.correct,
        (r"\frac{\sqrt{8}}{4}", r"\frac{1}{\sqrt2}"): Verdict.correct,
        (r"(3,\pi/2)", r"\left( 3, \frac{\pi}{2} \right)"): Verdict.correct,
        ("50", r"50\%"): Verdict.correct,
        (r"x\in[-2,7]", "[-2,7]"): Verdict.correct,
        ("10$", "10"): Verdict.correct,
        ("2(k+2)", "2k+2"): Verdict.wrong,
        (r"(\pi/2,3)", r"\left( 3, \frac{\pi}{2} \right)"): Verdict.wrong,
        ("Carla", r"\text{Evelyn}"): Verdict.wrong,
        (r"\frac{1}{", "1"): Verdict.unparseable,
        ("??!", "1"): Verdict.unparseable,
    }
    assert verdicts(list(expected)) == expected
    assert children() == []


def test_hostile_answers_cost_their_budget_at_most_and_the_next_answer_is_still_judged() -> None:
    hostile = ["9^{9^{9^9}}", "99999999!", "(" * 4000 + "1" + ")" * 4000]
    too_long = ["{" * 500_000 + "}" * 500_000, "1" * (MAX_ANSWER_CHARS + 1)]
    pairs = [*((text, "3") for text in (*hostile, *too_long)), ("4", "2+2")]
    found = verdicts(pairs, HASTY)
    assert [found[text, "3"] for text in hostile] == [Verdict.timeout] * 3
    assert [found[text, "3"] for text in too_long] == [Verdict.unparseable] * 2
    assert found["4", "2+2"] is Verdict.correct
    assert children() == []


def test_memory_is_bounded_and_running_out_of_it_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VerifierError, match="does not start"):
        verdicts([("2k", "k")], Verification(num_workers=1, budget_s=20.0, max_bytes=60 << 20))

    def out_of_memory(answer: str) -> list[object]:
        raise MemoryError

    monkeypatch.setattr(verifier_worker, "_parse", out_of_memory)
    assert verifier_worker.judge("2k", "k") == verifier_worker.MEMORY


def test_each_way_to_fail_is_counted_apart() -> None:
    problems = [Prompt(id="p", problem="?", answer="3")]
    texts = [r"\boxed{3}", r"\boxed{4}", "3", r"\boxed{??!}", r"\boxed{9^{9^{9^9}}}", r"\boxed{2+1}", r"\boxed{}"]
    samples = to_samples(problems, [[Completion(text, 5, "stop") for text in texts]], AnswerFormat.boxed)
    told: list[tuple[int, int]] = []
    graded = asyncio.run(
        grade(samples, AnswerFormat.boxed, Verification(2, 1.0), lambda done, total: told.append((done, total)))
    )
    assert [sample.verdict.name for sample in graded] == [
        "correct", "wrong", "no_answer", "unparseable", "timeout", "correct", "no_answer",
    ]  # fmt: skip
    assert [sample.extracted for sample in graded][:3] == ["3", "4", None]
    assert told[0] == (4, 7) and told[-1] == (7, 7)


def test_the_same_answer_is_verified_once() -> None:
    problems = [Prompt(id="p", problem="?", answer="2k+2")]
    samples = to_samples(problems, [[Completion(r"\boxed{2(k+1)}", 5, "stop")] * 50], AnswerFormat.boxed)
    told: list[int] = []
    graded = asyncio.run(grade(samples, AnswerFormat.boxed, PATIENT, lambda done, _: told.append(done)))
    assert {sample.verdict for sample in graded} == {Verdict.correct}
    assert told == [0, 50]


def test_every_kind_of_answer_is_told_from_an_equal_and_from_a_wrong_one() -> None:
    """Straight through math-verify; a space keeps the key itself from being the same text."""
    rows = [json.loads(line) for line in (DATA / "math500.jsonl").read_text(encoding="utf-8").splitlines()]
    columns = {"key": "{answer} ", "equal": "{equivalent}", "wrong": "{wrong}"}
    pairs = {(row["kind"], name): (text.format(**row), row["answer"]) for row in rows for name, text in columns.items()}
    found = verdicts(list(pairs.values()))
    right = {"key": Verdict.correct, "equal": Verdict.correct, "wrong": Verdict.wrong}
    odd = {at for at, pair in pairs.items() if found[pair] is not right[at[1]]}
    # Algebra takes a unit for a factor: only the comparison of texts, which comes first, drops units.
    assert odd == {("unit", "key"), ("unit in a box", "key")}
    assert all(verdict(AnswerFormat.boxed, *pairs[at]) is Verdict.correct for at in odd)


def test_a_cancelled_verification_leaves_no_process() -> None:
    async def cancel_in_the_middle() -> None:
        task = asyncio.create_task(verify([("9^{9^{9^9}}", "3"), ("99999999!", "3")], PATIENT))
        while not children():
            await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_in_the_middle())
    assert children() == []


def test_a_process_that_dies_is_replaced_and_costs_its_own_answer_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mortal = tmp_path / "worker.py"
    mortal.write_text(
        "import os, sys\n"
        "print('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    if 'die' in line: os.kill(os.getpid(), 9)\n"
        "    print('correct', flush=True)\n"
    )
    monkeypatch.setattr(verifier, "_WORKER", mortal)
    pairs = [("1", "x"), ("die", "x"), ("2", "x"), ("die twice", "x"), ("3", "x")]
    found = verdicts(pairs, Verification(num_workers=1, budget_s=20.0))
    assert [found[pair].name for pair in pairs] == ["correct", "timeout", "correct", "timeout", "correct"]


def test_a_verifier_that_cannot_start_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "worker.py"
    broken.write_text("print('ImportError: No module named math_verify')")
    monkeypatch.setattr(verifier, "_WORKER", broken)
    with pytest.raises(VerifierError, match="does not start .*No module named math_verify"):
        verdicts([("1", "x")])


def test_the_process_imports_neither_ray_nor_torch_nor_this_package() -> None:
    code = (
        "import runpy, sys; sys.argv = ['worker', '5', str(1 << 30)]; sys.stdin = iter([]); "
        f"runpy.run_path({str(verifier._WORKER)!r}, run_name='__main__'); "
        "print([name for name in ('ray', 'torch', 'opd_ray', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["ready", "[]"]
