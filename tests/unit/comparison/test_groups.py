"""Verdicts and tables on runs with known answers."""

from pathlib import Path

import numpy as np
import pytest

from opd_ray.comparison.groups import compare_runs
from opd_ray.comparison.record import Comparison, Difference, Spread
from opd_ray.errors import DataError
from opd_ray.evaluation import pass_at_k
from opd_ray.evaluation.significance import t_quantile
from tests.unit.run_folders import draw_correct, write_after, write_run, write_samples, write_study


def find(comparison: Comparison, variant: str, metric: str = "avg@8", benchmark: str = "tiny") -> Difference:
    [found] = [
        difference
        for condition in comparison.conditions
        for difference in condition.differences
        if (difference.variant, difference.metric, difference.benchmark) == (variant, metric, benchmark)
        and difference.relation == "base"
    ]
    return found


def test_a_variant_that_is_better_worse_or_the_same(tmp_path: Path) -> None:
    write_study(tmp_path, {"lsm": 0.5, "lsm_block64": 0.6, "lsm_tis": 0.5, "opd": 0.5, "opd_block64": 0.4})
    comparison = compare_runs([tmp_path], 2000)
    better, same, worse = (find(comparison, name) for name in ("lsm_block64", "lsm_tis", "opd_block64"))
    assert (better.verdict, same.verdict, worse.verdict) == ("better", "cannot tell", "worse")
    assert (better.against, same.against, worse.against) == ("lsm", "lsm", "opd")
    assert 0 < better.low < 0.1 < better.high and worse.low < -0.1 < worse.high < 0 and same.low < 0 < same.high
    # Only what cannot be told says how many seeds it would take.
    assert better.seeds_needed is None and better.remark == ""
    assert same.smallest_visible is not None and same.smallest_visible > abs(same.difference)
    assert (same.seeds_needed is None or same.seeds_needed > 5) and same.remark != ""
    assert comparison.conditions[0].name == ""


def test_scores_are_the_papers_estimators_with_a_t_interval(tmp_path: Path) -> None:
    counts = {seed: [8, 4, seed, 0] for seed in (0, 1, 2)}
    for seed, correct in counts.items():
        write_after(write_run(tmp_path, "lsm", seed), {"tiny": correct})
    [condition] = compare_runs([tmp_path], 100).conditions
    assert condition.metrics == ["pass@8", "avg@8"] and condition.benchmarks == ["tiny"]
    scores = condition.variants[0].scores["tiny"]
    averages = [np.mean(correct) / 8 for correct in counts.values()]
    half = t_quantile(0.975, 2) * np.std(averages, ddof=1) / np.sqrt(3)
    average = scores["avg@8"]
    assert (average.mean, average.low, average.high) == pytest.approx(
        (np.mean(averages), np.mean(averages) - half, np.mean(averages) + half)
    )
    assert scores["pass@8"].by_seed == {0: 0.5, 1: 0.75, 2: 0.75}
    assert (average.num_seeds, average.num_problems) == (3, 4)


def test_more_samples_than_eight_still_give_pass_at_8_and_fewer_the_largest_k(tmp_path: Path) -> None:
    write_after(write_run(tmp_path / "many", "lsm", 0), {"tiny": [3, 9]}, num_samples=16)
    [condition] = compare_runs([tmp_path / "many"], 100).conditions
    assert condition.metrics == ["pass@8", "avg@16"]
    expected = pass_at_k([16, 16], [3, 9], 8).mean()
    assert condition.variants[0].scores["tiny"]["pass@8"].mean == pytest.approx(expected)
    write_after(write_run(tmp_path / "few", "lsm", 0), {"tiny": [1, 2]}, num_samples=4)
    assert compare_runs([tmp_path / "few"], 100).conditions[0].metrics == ["pass@4", "avg@4"]
    both = compare_runs([tmp_path / "few", write_study_of_eight(tmp_path / "eight")], 100)
    assert both.conditions[0].metrics == ["pass@4", "avg@n"]
    assert any("4 to 8 samples" in note for note in both.notes)


def write_study_of_eight(folder: Path) -> Path:
    run = write_run(folder, "lsm", 1)
    write_after(run, {"tiny": [5, 6]})
    return run


def test_one_seed_gives_an_interval_over_problems_and_no_verdict(tmp_path: Path) -> None:
    write_study(tmp_path, {"lsm": 0.3, "lsm_block64": 0.8}, seeds=1)
    found = find(compare_runs([tmp_path], 1000), "lsm_block64")
    assert found.low > 0.3 and found.verdict == "cannot tell"
    assert "one seed: the interval is over problems only" in found.remark
    assert found.smallest_visible is None and found.seeds_needed is None and found.survives_holm is False


def test_the_mean_of_benchmarks_is_the_headline_and_counts_each_alike(tmp_path: Path) -> None:
    for experiment, shift in (("lsm", 0.0), ("lsm_block64", 0.2)):
        for seed in range(3):
            run = write_run(tmp_path, experiment, seed)
            write_after(run, {"tiny": draw_correct(0.5 + shift, seed, experiment, 200)})
            folder = run / "evaluation"
            write_samples(folder / "student-aime24.parquet", {"aime24": draw_correct(0.3, seed, experiment, 30)})
    [condition] = compare_runs([tmp_path], 500).conditions
    assert condition.benchmarks == ["aime24", "tiny"] and condition.headline == "mean"
    scores = condition.variants[1].scores
    mean = (scores["aime24"]["avg@8"].mean + scores["tiny"]["avg@8"].mean) / 2
    assert scores["mean"]["avg@8"].mean == pytest.approx(mean)
    gaps = {name: [d.difference for d in condition.differences if d.benchmark == name] for name in scores}
    assert gaps["mean"][1] == pytest.approx((gaps["tiny"][1] + gaps["aime24"][1]) / 2)
    assert {d.benchmark: d.survives_holm is not None for d in condition.differences} == {
        "aime24": False, "tiny": False, "mean": True
    }  # fmt: skip


def test_samples_of_the_evaluate_verb_count_where_all_runs_have_them(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "lsm", seed) for seed in (0, 1)]
    for run in runs:
        write_after(run, {"tiny": [0, 0]})
    write_samples(runs[0] / "evaluation" / "student-tiny.parquet", {"tiny": [8, 8]})
    [condition] = compare_runs([tmp_path], 100).conditions
    assert condition.variants[0].scores["tiny"]["avg@8"].by_seed == {0: 0.0, 1: 0.0}
    write_samples(runs[1] / "evaluation" / "student-tiny.parquet", {"tiny": [8, 0]})
    [condition] = compare_runs([tmp_path], 100).conditions
    assert condition.variants[0].scores["tiny"]["avg@8"].by_seed == {0: 1.0, 1: 0.5}


def test_only_problems_that_all_runs_have_count(tmp_path: Path) -> None:
    write_after(write_run(tmp_path, "lsm", 0), {"tiny": {"a": 8, "b": 4}})
    write_after(write_run(tmp_path, "lsm_block64", 0), {"tiny": {"b": 2, "c": 0}})
    comparison = compare_runs([tmp_path], 100)
    assert find(comparison, "lsm_block64").difference == pytest.approx(-0.25)
    assert comparison.notes == ["tiny: 1 of up to 2 problems are in all runs, and only these count"]


def test_lengths_of_answers_are_over_seeds(tmp_path: Path) -> None:
    # Of a problem's 8 samples those that are not right take turns at four verdicts, and one of them was cut.
    for seed, right in ((0, 4), (1, 8)):
        write_after(write_run(tmp_path, "lsm", seed), {"tiny": [right]})
    figures = compare_runs([tmp_path], 100).conditions[0].variants[0].figures
    assert figures["answers/truncated_share/tiny"] == Spread(1 / 16, 0.0, 1 / 8)
    assert figures["answers/mean_tokens/tiny"] == Spread(100.0, 100.0, 100.0)


def test_samples_that_were_made_differently_are_pointed_out(tmp_path: Path) -> None:
    for seed, temperature in ((0, 1.0), (1, 0.5)):
        file = write_run(tmp_path, "lsm", seed) / "evaluation" / "student-tiny.parquet"
        write_samples(file, {"tiny": [1]}, header={"temperature": temperature, "top_p": 0.9})
    assert compare_runs([tmp_path], 100).notes == [
        "tiny: sampled with different temperature (0.5, 1.0), so scores do not compare"
    ]


def test_seeds_are_paired_by_number(tmp_path: Path) -> None:
    # A shift that all seeds share beside seeds that differ by far more.
    for seed, level in ((0, 1), (1, 4), (2, 6)):
        write_after(write_run(tmp_path, "lsm", seed), {"tiny": [level] * 20})
        write_after(write_run(tmp_path, "lsm_block64", seed), {"tiny": [level + 1] * 20})
    write_after(write_run(tmp_path, "lsm_block64", 7), {"tiny": [0] * 20})
    found = find(compare_runs([tmp_path], 500), "lsm_block64")
    assert (found.difference, found.low, found.high) == pytest.approx((0.125, 0.125, 0.125))
    assert (found.num_seeds, found.verdict) == (3, "better")


def test_without_a_common_seed_or_a_base_it_says_so(tmp_path: Path) -> None:
    for experiment, seed in (("lsm", 0), ("lsm_block64", 1), ("opd_block64", 0)):
        write_after(write_run(tmp_path, experiment, seed), {"tiny": [1, 2]})
    [condition] = compare_runs([tmp_path], 100).conditions
    remarks = {variant.name: variant.remark for variant in condition.variants}
    assert remarks == {
        "lsm": "", "lsm_block64": "no seed in common with lsm", "opd_block64": "its ungated base is not among the runs"
    }  # fmt: skip
    assert condition.differences == []


def test_a_gate_is_also_judged_against_its_control(tmp_path: Path) -> None:
    write_study(tmp_path, {"lsm": 0.5, "lsm_block64": 0.65, "lsm_block64_shuffle": 0.5}, seeds=4)
    [condition] = compare_runs([tmp_path], 1000).conditions
    [found] = [d for d in condition.differences if d.relation == "control" and d.metric == "avg@8"]
    assert (found.variant, found.against, found.verdict) == ("lsm_block64", "lsm_block64_shuffle", "better")


def test_conditions_are_kept_apart_and_what_differs_is_listed(tmp_path: Path) -> None:
    for staleness in (0, 4):
        write_study(
            tmp_path / str(staleness), {"lsm": 0.5, "lsm_block64": 0.6}, 2,
            replay={"reuse": 2, "max_staleness": staleness},
        )  # fmt: skip
    comparison = compare_runs([tmp_path], 100)
    assert [condition.name for condition in comparison.conditions] == [
        "replay.max_staleness=0", "replay.max_staleness=4"
    ]  # fmt: skip
    listed = {found.key: (found.role, found.values) for found in comparison.config_differences}
    assert listed == {
        "experiment": ("variant", {"lsm": 4, "lsm_block64": 4}),
        "gate.kind": ("variant", {"block": 4, "off": 4}),
        "replay.max_staleness": ("condition", {"0": 4, "4": 4}),
        "seed": ("not compared", {"0": 4, "1": 4}),
    }


def test_holm_is_over_all_headlines_of_a_metric(tmp_path: Path) -> None:
    write_study(tmp_path, {"lsm": 0.5, "lsm_block64": 0.75, "lsm_tis": 0.5})
    found = compare_runs([tmp_path], 500)
    marks = {(d.variant, d.metric): d.survives_holm for d in found.headlines()}
    assert len(marks) == 4
    assert marks["lsm_block64", "avg@8"] is True and marks["lsm_tis", "avg@8"] is False


def test_unfinished_damaged_and_replaced_runs_are_left_out_with_the_reason(tmp_path: Path) -> None:
    for stamp in ("20260101-000000", "20260102-000000"):
        write_after(write_run(tmp_path, "lsm", 0, stamp=stamp), {"tiny": [int(stamp[7])]})
    write_run(tmp_path, "lsm", 1, status="failed", folder="failed")
    write_run(tmp_path, "lsm", 2, status="running", folder="running")
    (write_run(tmp_path, "lsm", 3, folder="damaged") / "config.yaml").write_text("a: [")
    comparison = compare_runs([tmp_path], 100)
    why = {found.run: found.why for found in comparison.left_out}
    assert why.pop("damaged").endswith("is not YAML: take the run away, or restore the file")
    assert why == {
        "failed": "failed: it broke",
        "running": "running",
        "lsm-tiny-s0-20260101-000000": "a newer run has the same config and seed",
    }
    assert comparison.num_runs == 1
    assert comparison.conditions[0].variants[0].scores["tiny"]["avg@8"].mean == pytest.approx(2 / 8)


def test_runs_without_samples_keep_their_curves_and_say_so(tmp_path: Path) -> None:
    write_after(write_run(tmp_path, "lsm", 0), {"tiny": [1, 2]})
    write_run(tmp_path, "lsm", 1)
    write_run(tmp_path, "lsm_block64", 0)
    comparison = compare_runs([tmp_path], 100)
    assert comparison.notes == [
        "lsm: no samples of an evaluation for seed 1", "lsm_block64: no samples of an evaluation, so no scores"
    ]  # fmt: skip
    lsm, gated = comparison.conditions[0].variants
    assert lsm.scores["tiny"]["avg@8"].num_seeds == 1 and gated.scores["tiny"] == {}
    assert "gate/value/p05" in gated.curves and gated.figures["steps"].mean == 40


def test_nothing_finished_is_an_error(tmp_path: Path) -> None:
    write_run(tmp_path, "lsm", 0, status="failed")
    with pytest.raises(DataError, match="none of the 1 runs is finished .*failed: it broke"):
        compare_runs([tmp_path])
