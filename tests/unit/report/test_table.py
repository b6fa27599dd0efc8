import pytest

from opd_ray.evaluation import EvaluationResult, Verdict
from opd_ray.report import gap_closed, results_table


def evaluation(avg: float, best: float, n: int = 8) -> dict[str, float]:
    return EvaluationResult(
        num_problems=64,
        samples_per_problem=n,
        pass_at={1: avg, n: best},
        pass_at_n_interval=(best, best),
        avg_at_n=avg,
        avg_at_n_interval=(avg, avg),
        shares=dict.fromkeys(Verdict, 0.0),
        truncated_share=0.0,
        mean_tokens=100.0,
        wall_s=1.0,
    ).as_dict()


BEFORE, AFTER, TEACHER = evaluation(0.2, 0.5), evaluation(0.8, 0.96875), evaluation(1.0, 1.0)


def test_the_whole_table() -> None:
    assert results_table(BEFORE, AFTER, TEACHER) == (
        "                    pass@8     avg@8\n"
        "student before       0.500     0.200\n"
        "student after        0.969     0.800\n"
        "teacher              1.000     1.000\n"
        "gap closed                      75 %\n"
        "(64 problems not trained on, 8 samples each)"
    )


@pytest.mark.parametrize("missing", [(None, AFTER, TEACHER), (BEFORE, None, TEACHER), (BEFORE, AFTER, None)])
def test_a_missing_evaluation_gets_dashes_and_no_gap(missing: tuple[dict[str, float] | None, ...]) -> None:
    table = results_table(*missing)
    row = ["student before", "student after", "teacher"][missing.index(None)]
    assert f"{row:<16}{'-':>10}{'-':>10}" in table.splitlines()
    assert "gap" not in table and table.count("0.") + table.count("1.0") >= 2


def test_no_evaluation_at_all_is_said() -> None:
    assert results_table(None, None, None) == "no evaluation was run (evaluation.path is empty)"


def test_other_numbers_of_samples_name_their_columns() -> None:
    table = results_table(evaluation(0.2, 0.5, n=4), None, None)
    assert "pass@4" in table and "avg@4" in table and "4 samples each" in table


def test_it_fits_80_columns_without_control_codes() -> None:
    table = results_table(evaluation(0.2, 0.5, n=1024), evaluation(0.2, 0.5, n=1024), TEACHER)
    assert max(len(line) for line in table.splitlines()) <= 80
    assert table.isprintable() or set(table) - {"\n"} <= set(map(chr, range(32, 127)))


@pytest.mark.parametrize(
    ("start", "end", "goal", "closed"),
    [(0.2, 0.8, 1.0, 0.75), (0.2, 1.0, 0.9, 8 / 7), (0.4, 0.3, 0.9, -0.2), (0.5, 0.5, 1.0, 0.0)],
)
def test_gap_closed(start: float, end: float, goal: float, closed: float) -> None:
    got = gap_closed(evaluation(start, 1), evaluation(end, 1), evaluation(goal, 1))
    assert got == pytest.approx(closed)


@pytest.mark.parametrize(("start", "goal"), [(0.9, 0.9), (0.9, 0.5), (0.5, float("nan"))])
def test_without_a_gap_there_is_no_share_of_it(start: float, goal: float) -> None:
    assert gap_closed(evaluation(start, 1), evaluation(0.9, 1), evaluation(goal, 1)) is None
    assert "gap" not in results_table(evaluation(start, 1), evaluation(0.9, 1), evaluation(goal, 1))


def test_what_is_not_an_evaluation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs avg_at_n, got only \['loss'\]"):
        results_table({"loss": 1.0}, None, None)
