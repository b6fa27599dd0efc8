import json
import subprocess
import sys

import pytest

from opd_ray.config.choices import AnswerFormat
from opd_ray.errors import DataError
from opd_ray.evaluation import Completion, check_problems, score
from opd_ray.types import Prompt

NUMBER = AnswerFormat.last_number


def prompt(name: str, answer: str | None) -> Prompt:
    return Prompt(id=name, problem="?", answer=answer, index=7)


def samples(*texts: str, num_tokens: int = 10, finish_reason: str = "stop") -> list[Completion]:
    return [Completion(text, num_tokens, finish_reason) for text in texts]


def test_worked_by_hand() -> None:
    problems = [prompt("a", "1"), prompt("b", "2")]
    completions = [
        samples("1", "1", "0", "0"),
        samples("0", "0", "0") + samples("0", num_tokens=50, finish_reason="length"),
    ]
    result = score(problems, completions, NUMBER, wall_s=1.5)
    # Problem a: 1/2, 5/6, 1, 1; problem b: 0.
    assert result.pass_at == pytest.approx({1: 0.25, 2: 5 / 12, 3: 0.5, 4: 0.5})
    assert result.as_dict() == pytest.approx(
        {
            "pass_at_1": 0.25,
            "pass_at_2": 5 / 12,
            "pass_at_4": 0.5,
            # Two problems: a resample has none, one or two of the first one.
            "pass_at_4_low": 0.0,
            "pass_at_4_high": 1.0,
            "avg_at_4": 0.25,
            "avg_at_4_low": 0.0,
            "avg_at_4_high": 0.5,
            "num_problems": 2,
            "samples_per_problem": 4,
            "wrong_share": 6 / 8,
            "no_answer_share": 0.0,
            "unparseable_share": 0.0,
            "timeout_share": 0.0,
            "truncated_share": 1 / 8,
            "mean_tokens": 15.0,
            "wall_s": 1.5,
        }
    )
    json.dumps(result.as_dict(), allow_nan=False)


@pytest.mark.parametrize(("n", "ks"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_reports_powers_of_two_and_n(n: int, ks: list[int]) -> None:
    result = score([prompt("a", "1")], [samples(*["1"] * n)], NUMBER)
    assert [k for k in range(1, n + 1) if f"pass_at_{k}" in result.as_dict()] == ks
    assert [k for k in range(1, n + 1) if f"pass_at_{k}" in result.as_dict(every_k=True)] == list(range(1, n + 1))
    assert f"pass_at_{n}" in result.as_dict() and f"avg_at_{n}" in result.as_dict()


def test_completions_belong_to_their_own_problem() -> None:
    problems = [prompt("a", "1"), prompt("b", "2"), prompt("c", "3")]
    right = [samples("1"), samples("2"), samples("3")]
    assert score(problems, right, NUMBER).avg_at_n == 1.0
    assert score(problems, right[1:] + right[:1], NUMBER).avg_at_n == 0.0


def test_the_format_decides_what_counts() -> None:
    problems, completions = [prompt("a", "5")], [samples("#5")]
    assert score(problems, completions, AnswerFormat.tiny).avg_at_n == 1.0
    assert score(problems, completions, AnswerFormat.boxed).avg_at_n == 0.0


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        ([], "no problems"),
        ([prompt("a", "1"), prompt("b", None)], r"'b' \(row 7\) has no answer"),
        ([prompt("a", "seven")], "'seven'.*answer_format=last_number"),
    ],
)
def test_problems_without_a_usable_answer_are_data_errors(problems: list[Prompt], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_problems(problems, NUMBER)
    with pytest.raises(DataError, match=message):
        score(problems, [samples("1")] * len(problems), NUMBER)


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        ([samples("1")], "2 problems but 1 lists"),
        ([samples("1", "1"), samples("1")], "'b' has 1 completions and the first problem 2"),
        ([[], []], "'a' has 0 completions"),
    ],
)
def test_lists_that_do_not_fit_are_refused(completions: list[list[Completion]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score([prompt("a", "1"), prompt("b", "2")], completions, NUMBER)


def test_engines_are_not_imported() -> None:
    code = (
        "import sys, opd_ray.evaluation, opd_ray.telemetry, opd_ray.report, opd_ray.run.folder\n"
        "import opd_ray.report.learning_curve\n"
        "heavy = {'ray', 'torch', 'vllm', 'transformers', 'deepspeed', 'wandb', 'matplotlib', 'pyarrow'}\n"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
