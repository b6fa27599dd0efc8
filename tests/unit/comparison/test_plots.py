"""What the curves of a comparison show."""

from opd_ray.comparison.plots import curve_picture
from opd_ray.comparison.record import ConditionResult, Curve, VariantResult


def shown(evaluation_steps: list[int]) -> bytes:
    levels = [0.5 for _ in evaluation_steps]
    curves = {"evaluation": Curve(evaluation_steps, levels, levels, levels)} if evaluation_steps else {}
    curves["learner/kl_to_teacher/mean"] = Curve([1, 2, 3], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0])
    variant = VariantResult("lsm", "off", [0], ["runs/a"], None, curves=curves)
    return curve_picture(ConditionResult("", {}, [], [], [variant]), "curves-1").svg


def test_runs_that_were_evaluated_once_show_the_distance_to_the_teacher() -> None:
    assert b"sampled KL to the teacher" in shown([60]) and b"avg@n" not in shown([60])
    assert b"avg@n" in shown([0, 60]) and b"sampled KL" not in shown([0, 60])
    assert b"avg@n" in shown([])
