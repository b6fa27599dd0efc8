from opd_ray.report.benchmark_table import benchmark_table


def figures(pass_at_2: float, avg_at_2: float) -> dict[str, float]:
    return {
        "pass_at_2": pass_at_2,
        "pass_at_2_low": pass_at_2 - 0.1,
        "pass_at_2_high": pass_at_2 + 0.1,
        "avg_at_2": avg_at_2,
        "avg_at_2_low": 0.0,
        "avg_at_2_high": 1.0,
        "num_problems": 30,
        "truncated_share": 0.125,
        "no_answer_share": 0.25,
        "unparseable_share": 0.0,
        "timeout_share": 0.005,
        "mean_tokens": 1234.4,
    }


def test_a_line_a_benchmark_and_their_mean() -> None:
    lines = benchmark_table({"aime24": figures(0.5, 0.25), "math500": figures(0.75, 0.5)}).splitlines()
    assert " ".join(lines[0].split()) == ("problems pass@2 95 % avg@2 95 % cut off no answer unreadable timeout tokens")
    assert " ".join(lines[1].split()) == (
        "aime24 30 0.500 0.400-0.600 0.250 0.000-1.000 12.5 % 25.0 % 0.0 % 0.5 % 1234"
    )
    assert lines[3].split() == ["mean", "0.625", "0.375"]
    assert len({len(line) for line in lines[:3]}) == 1


def test_one_benchmark_needs_no_mean() -> None:
    assert len(benchmark_table({"tiny": figures(1.0, 1.0)}).splitlines()) == 2
