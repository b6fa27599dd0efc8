"""One local Ray for all integration tests, and random-weight tiny models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from tests.integration.learners import Learners
    from tests.integration.runs import Engines
    from tests.integration.variants import VariantGroup

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# The smallest real run, for tests of what starts one.
SHORT_JOB = [
    "num_steps=2",
    "evaluation.path=''",
    "rollout.num_engines=1",
    "rollout.prompts_per_step=2",
    "rollout.samples_per_prompt=4",
    "learner.num_ranks=1",
    "data.num_prompts=8",
]


def assert_gone(processes: list[psutil.Process], within_s: float = 15.0) -> None:
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    assert [" ".join(process.cmdline()) for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


@pytest.fixture(scope="session")
def killed() -> Iterator[list[psutil.Process]]:
    """Processes of commands that were killed, which must be gone after all tests.

    Not sooner, as two agents of Ray look once a minute whether their node is still there.
    """
    processes: list[psutil.Process] = []
    yield processes
    assert_gone(processes, within_s=90)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Two CPUs, whatever the machine has, so that resource arithmetic is the same everywhere."""
    import logging

    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


def save_random_model(folder: Path, seed: int, *, vocab_size: int | None = None) -> Path:
    """A Qwen3 model of 0.1 M parameters with the embedded tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from opd_ray.tiny.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(512)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Larger than the usual 0.02: otherwise two random models hardly differ.
        initializer_range=0.15,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "student", seed=1)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "teacher", seed=2)


@pytest.fixture(scope="session")
def learners(ray_cluster: None) -> Iterator[Learners]:
    """Learner ranks that the runs of several tests share."""
    from tests.integration.learners import Learners

    groups = Learners()
    yield groups
    groups.end()


@pytest.fixture(scope="session")
def one_rank(learners: Learners, student_folder: Path) -> VariantGroup:
    """The learner rank that several tests share."""
    return variants(learners, student_folder, num_ranks=1)


@pytest.fixture(scope="session")
def two_ranks(learners: Learners, student_folder: Path) -> VariantGroup:
    """The two learner ranks that several tests share."""
    return variants(learners, student_folder, num_ranks=2)


def variants(learners: Learners, student_folder: Path, num_ranks: int) -> VariantGroup:
    from tests.integration.runs import small_config
    from tests.integration.variants import VariantGroup

    return VariantGroup(learners, small_config("lsm", f"learner.num_ranks={num_ranks}"), str(student_folder))


@pytest.fixture(scope="session")
def engines(learners: Learners, student_folder: Path, teacher_folder: Path) -> Iterator[Engines]:
    """A rollout engine and a teacher that several tests share; whoever kills them has them replaced."""
    import asyncio

    from opd_ray.rollout.group import RolloutGroup
    from opd_ray.teacher.worker import TeacherGroup
    from opd_ray.training.preflight import preflight
    from tests.integration.learners import NO_SHARE
    from tests.integration.runs import Engines, small_config

    cfg = small_config("lsm_block64", "faults.max_restarts=20")
    report = preflight(cfg, str(student_folder), str(teacher_folder), [], [])
    rollout = RolloutGroup.create(cfg, NO_SHARE, [str(student_folder)])
    teacher = TeacherGroup.create(cfg, NO_SHARE, report.vocab_size, report.tokenizer_fingerprint, str(teacher_folder))

    async def ready() -> None:
        await asyncio.gather(rollout.ready(), teacher.ready())

    asyncio.run(ready())
    yield Engines(rollout, teacher, str(student_folder), learners)
    asyncio.run(rollout.stop())
    rollout.shutdown()
    teacher.shutdown()
