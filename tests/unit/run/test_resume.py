"""Resuming from a checkpoint: what is in it, the run that a command resumes, and that nothing is lost or repeated."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.config.schema import RunConfig
from opd_ray.errors import CheckpointError, RunFolderError
from opd_ray.run.checkpoint import INDEX, Checkpoints, latest_checkpoint
from opd_ray.run.folder import RunFolder
from opd_ray.run.resume import checkpoint_to_resume
from opd_ray.storage.committed_folder import ended_in_thread
from tests.unit.fake_actors import Run, World, config, train


def with_checkpoints(max_staleness: int, reuse: int, every: int, num_steps: int = 8) -> RunConfig:
    """Two engines, and a checkpoint each `every` steps."""
    cfg = config(max_staleness, reuse, num_steps, 2)
    cfg.checkpoint.every = every
    return cfg


async def cut_off_and_resumed(
    cfg: RunConfig, folder: Path, turns: int, seed: int, num_steps: int = 0
) -> tuple[Run, Run, int]:
    """Cut off so many turns of the event loop after step `num_steps`; both runs, and the version between them."""
    first = Run(cfg, World(seed, 6), folder)
    task = asyncio.create_task(first.train())
    while len(first.trained) < num_steps:
        await asyncio.sleep(0)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    checkpoint = latest_checkpoint(folder)
    second = Run(cfg, World(seed + 1, 6), folder)
    await second.train(checkpoint)
    return first, second, checkpoint.policy_version if checkpoint else 0


@given(st.integers(0, 3), st.integers(1, 2), st.integers(1, 3), st.integers(0, 500), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_resumed_run_loses_and_repeats_no_trajectory(
    max_staleness: int, reuse: int, every: int, turns: int, seed: int
) -> None:
    cfg = with_checkpoints(max_staleness, reuse, every)
    with TemporaryDirectory() as folder:
        first, second, version = asyncio.run(cut_off_and_resumed(cfg, Path(folder), turns, seed))
    assert version % every == 0
    trained = [entry for entry in first.trained if entry[0] <= version] + second.trained
    assert [step for step, _ in trained] == list(range(1, 9))
    uses = Counter(trajectory_id for _, trajectory_ids in trained for trajectory_id in trajectory_ids)
    books = second.books
    assert books["started"] == books["trained"] + books["in_store"] + books["in_flight"]
    # Every trajectory that was started has all its uses, but for the last batch's and what is left over.
    assert sum(count == reuse for count in uses.values()) == books["trained"]
    assert max(uses.values()) <= reuse
    assert set(uses) <= set(range(books["started"]))


@given(st.integers(1, 2), st.integers(1, 3), st.integers(0, 500), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_in_lock_step_the_same_trajectories_train_in_the_same_steps(
    reuse: int, every: int, turns: int, seed: int
) -> None:
    cfg = with_checkpoints(0, reuse, every)
    unbroken = train(cfg, World(7, 6))
    with TemporaryDirectory() as folder:
        first, second, version = asyncio.run(cut_off_and_resumed(cfg, Path(folder), turns, seed))
    assert [entry for entry in first.trained if entry[0] <= version] + second.trained == unbroken.trained
    prompts = [info.trajectory_id for _, batch in second.world.batches for info in batch.infos]
    assert prompts


def test_the_prompts_go_on_where_they_were(tmp_path: Path) -> None:
    """The prompts of the unbroken run, trajectory by trajectory: in flight ones again, then those that come next."""
    cfg = with_checkpoints(2, 1, 2, num_steps=12)

    async def scenario() -> tuple[dict[int, str], dict[int, str]]:
        unbroken = Run(cfg, World(1, 6))
        await unbroken.train()
        first, second, version = await cut_off_and_resumed(cfg, tmp_path, 10, 1, num_steps=5)
        assert version > 0
        given: dict[int, str] = {}
        for run in (first, second):
            given |= run.world.prompts
        return unbroken.world.prompts, given

    expected, given = asyncio.run(scenario())
    assert given == expected


def test_only_the_newest_checkpoints_stay_and_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    cfg = with_checkpoints(0, 1, 2)
    cfg.checkpoint.keep = 2
    train(cfg, World(1, 2), folder=tmp_path)
    folders = tmp_path / "checkpoints"
    assert sorted(path.name for path in folders.iterdir()) == ["step-000006", "step-000008"]
    assert {path.name for path in (folders / "step-000008").iterdir()} == {
        "checkpoint.json",
        "learner",
        "store",
        "student",
    }
    checkpoints = Checkpoints(tmp_path, 1, 2, {}, dict)

    async def full_disk() -> None:
        raise OSError(28, "No space left on device")

    async def fail() -> None:
        checkpoints.commit(await checkpoints.begin(9), full_disk)
        await checkpoints.settle()

    with pytest.raises(CheckpointError, match=r"step-000009 cannot be written \(No space left on device\): make room"):
        asyncio.run(fail())
    assert sorted(path.name for path in folders.iterdir()) == ["step-000006", "step-000008"]


async def nothing_more() -> None:
    """All of the checkpoint is written."""


def test_a_checkpoint_that_failed_is_raised_with_the_next_step(tmp_path: Path) -> None:
    async def scenario() -> None:
        checkpoints = Checkpoints(tmp_path, 1, 2, {}, dict)

        async def lost() -> None:
            raise CheckpointError("a payload cannot be written: make room")

        checkpoints.commit(await checkpoints.begin(1), lost)
        checkpoints.raise_failure()  # it is still being written
        await asyncio.sleep(0.05)
        with pytest.raises(CheckpointError, match="make room"):
            checkpoints.raise_failure()
        with pytest.raises(CheckpointError, match="make room"):
            await checkpoints.begin(2)
        await checkpoints.stop()
        assert list((tmp_path / "checkpoints").iterdir()) == []

    asyncio.run(scenario())


def test_stopping_ends_what_is_being_written_and_leaves_the_older_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        checkpoints = Checkpoints(tmp_path, 1, 2, {}, dict)
        checkpoints.commit(await checkpoints.begin(1), nothing_more)
        await checkpoints.settle()

        async def slow() -> None:
            await asyncio.sleep(3600)

        checkpoints.commit(await checkpoints.begin(2), slow)
        await asyncio.sleep(0.01)
        await checkpoints.stop()
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]

    asyncio.run(scenario())


def a_run(cfg: RunConfig, values: dict[str, Any], status: str = "interrupted", with_checkpoint: bool = True) -> Path:
    """A run folder as a run of `cfg` leaves it."""
    folder = RunFolder.create(cfg.runs_dir, cfg.run_name)
    if with_checkpoint:

        async def commit() -> None:
            checkpoints = Checkpoints(folder.path, 1, 1, values, dict)
            checkpoints.commit(await checkpoints.begin(3), nothing_more)
            await checkpoints.settle()

        asyncio.run(commit())
    folder.mark(status)  # type: ignore[arg-type]
    folder.close()
    return folder.path


def resumable(tmp_path: Path, resume: str = "auto") -> RunConfig:
    cfg = config(0, 1, 8)
    cfg.runs_dir, cfg.resume, cfg.scale = str(tmp_path), resume, "tiny"
    return cfg


VALUES = {"learner": {"lr": 0.1}, "num_steps": 8, "deadline_s": 5.0, "resume": "auto"}


@pytest.mark.parametrize("status", ["interrupted", "failed", "running"])
def test_a_run_that_was_cut_off_is_gone_on_with(tmp_path: Path, status: str) -> None:
    cfg = resumable(tmp_path)
    folder = a_run(cfg, VALUES, status)
    found = checkpoint_to_resume(cfg, {**VALUES, "deadline_s": 9.0, "resume": "auto"})
    assert found is not None
    assert (found.policy_version, found.folder.parents[1]) == (3, folder)


def test_what_is_not_gone_on_with(tmp_path: Path) -> None:
    cfg = resumable(tmp_path)
    assert checkpoint_to_resume(cfg, VALUES) is None
    folder = a_run(cfg, VALUES)
    assert checkpoint_to_resume(resumable(tmp_path, "never"), VALUES) is None
    assert checkpoint_to_resume(cfg, {**VALUES, "learner": {"lr": 0.2}}) is None
    running = RunFolder.reopen(folder)
    assert checkpoint_to_resume(cfg, VALUES) is None
    with pytest.raises(RunFolderError, match="run by another process: wait for its end"):
        RunFolder.reopen(folder)
    running.close()
    assert checkpoint_to_resume(cfg, VALUES) is not None
    a_run(cfg, VALUES, "finished")
    assert checkpoint_to_resume(cfg, VALUES) is None


def test_a_named_run(tmp_path: Path) -> None:
    cfg = resumable(tmp_path)
    folder = a_run(cfg, VALUES, "finished")
    cfg.resume = str(folder)
    assert checkpoint_to_resume(cfg, {**VALUES, "num_steps": 100}) is not None
    with pytest.raises(CheckpointError, match=r"made with learner.lr=0.1 and this run has 0.2: give the same"):
        checkpoint_to_resume(cfg, {**VALUES, "learner": {"lr": 0.2}})
    cfg.num_steps = 2
    with pytest.raises(CheckpointError, match=r"is at step 3: give num_steps >= 3"):
        checkpoint_to_resume(cfg, VALUES)
    cfg.resume = str(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is no folder: give a run folder, auto or never"):
        checkpoint_to_resume(cfg, VALUES)
    cfg.resume = str(a_run(cfg, VALUES, with_checkpoint=False))
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        checkpoint_to_resume(cfg, VALUES)


@pytest.mark.parametrize("damage", ["{", json.dumps({"format": 99}), json.dumps({"format": 1})])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    cfg = resumable(tmp_path)
    folder = a_run(cfg, VALUES)
    (folder / "checkpoints" / "step-000003" / INDEX).write_text(damage)
    # Nobody asked for this one in particular: a new run starts.
    assert checkpoint_to_resume(cfg, VALUES) is None
    cfg.resume = str(folder)
    with pytest.raises(CheckpointError, match=r"step-000003"):
        checkpoint_to_resume(cfg, VALUES)


@pytest.mark.parametrize("part", ["begin", "write", "commit"])
def test_a_cancelled_checkpoint_leaves_nothing_behind(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing writes on where a resumed run's checkpoint has begun."""
    may_continue = threading.Event()
    plain: dict[str, Any] = {"begin": Path.mkdir, "commit": Path.rename}

    def slow(self: Path, *args: Any, **options: Any) -> Any:
        may_continue.wait()
        return plain[part](self, *args, **options)

    async def write() -> None:
        if part == "write":
            await ended_in_thread(may_continue.wait)

    async def scenario() -> None:
        if part in plain:
            monkeypatch.setattr(Path, "mkdir" if part == "begin" else "rename", slow)
        checkpoints = Checkpoints(tmp_path, 1, 2, {}, dict)

        async def checkpoint() -> None:
            checkpoints.commit(await checkpoints.begin(1), write)
            await checkpoints.settle()

        task = asyncio.create_task(checkpoint())
        await asyncio.sleep(0.05)
        task.cancel()
        stopping = asyncio.create_task(checkpoints.stop())
        await asyncio.sleep(0.05)
        assert not (task.done() and stopping.done()), "it waits for its threads"
        may_continue.set()
        await asyncio.gather(task, stopping, return_exceptions=True)

    asyncio.run(scenario())
    left = [path.name for path in tmp_path.rglob("*") if path.is_dir() and path.name != "checkpoints"]
    assert left == (["step-000001"] if part == "commit" else [])
