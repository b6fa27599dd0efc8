"""Needs of workers: hand-made cases of ZeRO, engines and teachers, and how they move with the settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.planning.amounts import GIB, Amount, expected, least
from opd_ray.planning.learner_need import LearnerInput, learner_need, remedy
from opd_ray.planning.model_files import read_shape
from opd_ray.planning.serving_need import RolloutInput, TeacherInput, rollout_need, teacher_need

SHAPE = read_shape("Qwen/Qwen3-1.7B")
P = SHAPE.num_parameters
# DeepSpeed's default of 5e8 elements, in bfloat16.
BUCKET = 1e9
LEARNER = LearnerInput(
    shape=SHAPE,
    num_ranks=4,
    gpus=1,
    cpus=1,
    zero_stage=1,
    item_bytes=2,
    publish_bytes=2,
    microbatch_tokens=4096,
    top_k=32,
    gradient_checkpointing=True,
)
ENGINE = RolloutInput(
    shape=SHAPE,
    num_engines=2,
    gpus=1,
    cpus=1,
    item_bytes=2,
    max_model_tokens=10_000,
    sequences=16,
    kv_cache_bytes=4 * GIB,
    gpu_memory_utilization=0.5,
    gpu_bytes=80 * GIB,
)


def named(amounts: tuple[Amount, ...]) -> dict[str, Amount]:
    return {amount.name: amount for amount in amounts}


@pytest.mark.parametrize(
    ("stage", "weights", "gradients"), [(1, 2 * P, 2 * P), (2, 2 * P, 2 * P / 4), (3, 2 * P / 4, 2 * P / 4)]
)
def test_zero_divides_what_its_stage_says(stage: int, weights: float, gradients: float) -> None:
    device = named(learner_need(replace(LEARNER, zero_stage=stage)).device)
    assert device["weights"].least == weights
    assert device["gradients"].least == gradients
    assert device["masters, moments"].least == 12 * P / 4


def test_one_rank_in_mixed_precision_takes_16_bytes_a_parameter() -> None:
    need = learner_need(replace(LEARNER, num_ranks=1))
    assert least(need.device) == 16 * P + BUCKET
    # In float32 the masters are a second copy.
    assert least(learner_need(replace(LEARNER, num_ranks=1, item_bytes=4)).device) == 20 * P + 2 * BUCKET


def test_offload_moves_states_to_the_host() -> None:
    plain, moved = (learner_need(replace(LEARNER, offload_optimizer=on)) for on in (False, True))
    assert least(plain.device) - least(moved.device) == 12 * P / 4
    assert named(moved.host)["masters, moments"].least == 12 * P / 4
    both = replace(LEARNER, zero_stage=3, offload_optimizer=True, offload_parameters=True)
    assert "weights" not in named(learner_need(both).device)
    assert named(learner_need(both).host)["weights"].least == 2 * P / 4


def test_on_a_cpu_everything_lies_in_host_memory() -> None:
    need = learner_need(replace(LEARNER, gpus=0))
    assert need.device == ()
    assert {"process", "weights", "gradients", "masters, moments", "activations"} <= named(need.host).keys()


def test_checkpointing_keeps_less_and_long_batches_more() -> None:
    def kept(given_input: LearnerInput) -> float:
        return named(learner_need(given_input).device)["activations"].expected

    assert kept(replace(LEARNER, gradient_checkpointing=False)) > 10 * kept(LEARNER)
    assert kept(replace(LEARNER, microbatch_tokens=8192)) == 2 * kept(LEARNER)


def test_the_remedy_is_the_mildest_that_fits() -> None:
    alone = replace(LEARNER, num_ranks=1)
    # Masters 12 / N, weights 2, gradients 2 (from stage 2 on 2 / N) bytes a parameter.
    assert remedy(alone, 11 * P + BUCKET).startswith("set learner.num_ranks=2 (at least")
    assert remedy(alone, 9.5 * P + BUCKET).startswith("set learner.num_ranks=2 learner.zero_stage=2 (at least")
    assert remedy(LEARNER, 6 * P + BUCKET).startswith("set learner.zero_stage=2 (at least")
    assert "learner.offload=optimizer" in remedy(alone, 10.0)


@given(st.integers(1, 64), st.integers(1, 3), st.sampled_from([2, 4]), st.integers(1, 100_000), st.booleans())
def test_what_is_sure_is_never_more_than_what_is_expected(
    ranks: int, stage: int, size: int, tokens: int, is_gpu: bool
) -> None:
    given_input = replace(
        LEARNER, num_ranks=ranks, zero_stage=stage, item_bytes=size, microbatch_tokens=tokens, gpus=float(is_gpu)
    )
    need = learner_need(given_input)
    assert all(0 <= amount.least <= amount.expected for amount in (*need.device, *need.host))
    more = learner_need(replace(given_input, num_ranks=ranks + 1))
    assert least(more.device) + least(more.host) < least(need.device) + least(need.host)


def test_an_engine_fills_its_share_of_a_gpu() -> None:
    need = rollout_need(ENGINE)
    assert expected(need.device + need.filling) == pytest.approx(40 * GIB)
    assert named(need.device)["KV cache, one sequence"].least == 114_688 * 10_000
    room = 40 * GIB - expected(need.device) + 114_688 * 10_000
    assert need.notes[0].startswith(f"KV cache for {int(room // (114_688 * 10_000))} sequences of 10,000 tokens")


def test_a_window_or_an_unknown_model_makes_less_of_the_cache_sure() -> None:
    whole = 114_688 * 10_000
    for change, sure in (({"window": 2_500}, whole / 4), ({"model_type": "hybrid"}, 0), ({}, whole)):
        amount = replace(ENGINE, shape=replace(SHAPE, **change)).one_sequence
        assert (amount.expected, amount.least) == (whole, sure)


def test_tensor_parallel_engines_share_weights_and_cache() -> None:
    one, two = rollout_need(ENGINE), rollout_need(replace(ENGINE, tensor_parallel=2, gpus=2))
    assert least(two.device) == least(one.device) / 2
    # 8 key heads cannot be split over more than 8 GPUs.
    many = rollout_need(replace(ENGINE, tensor_parallel=16, gpus=16))
    assert named(many.device)["KV cache, one sequence"].least == 114_688 * 10_000 / 8


def test_an_engine_on_a_cpu_uses_of_its_cache_what_its_sequences_fill() -> None:
    cpu = replace(ENGINE, gpus=0, sequences=2)
    assert named(rollout_need(cpu).host)["KV cache"].expected == 2 * 10_000 * 114_688
    assert named(rollout_need(replace(cpu, sequences=1000)).host)["KV cache"].expected == 4 * GIB
    assert "the others wait" in rollout_need(replace(cpu, sequences=1000)).notes[0]


def test_a_teacher_holds_at_most_its_tile_of_logits() -> None:
    given_input = TeacherInput(SHAPE, 1, 1, 1, 2, batch_tokens=100, top_k=32)
    small, large = (teacher_need(replace(given_input, batch_tokens=tokens)) for tokens in (100, 100_000))
    assert named(small.device)["logits"].expected == 100 * 151_936 * (2 + 4)
    assert named(large.device)["logits"].expected == 2**25 * (2 + 4)
    assert named(small.device)["weights"].least == 2 * P


def test_a_teacher_in_an_engine_is_an_engine() -> None:
    given_input = TeacherInput(
        SHAPE,
        1,
        2,
        1,
        2,
        batch_tokens=100,
        top_k=32,
        tensor_parallel=2,
        engine_share=0.5,
        max_model_tokens=50,
        gpu_bytes=80 * GIB,
    )
    need = teacher_need(given_input)
    assert (need.role, need.device_share) == ("teacher", 0.5)
    assert named(need.device)["weights"].least == P
    assert named(need.device)["logits"].expected == 100 * 151_936 * 4
