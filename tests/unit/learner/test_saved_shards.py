"""Whatever way ranks had cut the parameters, any part of them comes back; a gap or a damaged file is refused."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_ray.errors import CheckpointError
from opd_ray.learner.optimizer_shards import MASTER, Fragment
from opd_ray.learner.saved_shards import SavedShards
from opd_ray.learner.state_files import (
    INDEX,
    RankPart,
    StateIndex,
    file_name,
    read_index,
    write_index,
    write_tensors,
)

SIZES = {"a": 7, "b": 1, "c": 12}
FULL = {
    name: 100 * number + torch.arange(size, dtype=torch.float32) for number, (name, size) in enumerate(SIZES.items())
}


def fragments_of(begin: int, end: int) -> tuple[Fragment, ...]:
    """Elements ``begin .. end`` of the parameters laid one after the other, as one flat partition."""
    found, at = [], 0
    for name, size in SIZES.items():
        start, stop = max(begin - at, 0), min(end - at, size)
        if start < stop:
            found.append(Fragment(name, start, stop - start, 0, at + start - begin))
        at += size
    return tuple(found)


def written(folder: Path, cuts: list[int]) -> StateIndex:
    """A state whose ranks hold what lies between the cuts, each with two elements of padding."""
    flat = torch.cat(list(FULL.values()))
    bounds = [0, *sorted(cuts), len(flat)]
    parts = []
    for rank, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        tensors: dict[str, Tensor] = {f"0.{MASTER}": torch.cat([flat[begin:end], torch.full((2,), -1.0)])}
        optimizer = write_tensors(folder, file_name("optimizer", rank), tensors)
        own = write_tensors(folder, file_name("rank", rank), {"rng.cpu": torch.zeros(1)})
        parts.append(RankPart(optimizer, own, fragments_of(begin, end), (float(rank),), ()))
    index = StateIndex({name: [size] for name, size in SIZES.items()}, {"counters": {"global_steps": 3}}, tuple(parts))
    write_index(folder, index)
    return index


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 20), max_size=4),
    st.sampled_from(sorted(SIZES)).flatmap(
        lambda name: st.tuples(st.just(name), st.integers(0, SIZES[name] - 1), st.integers(1, SIZES[name]))
    ),
)
def test_any_part_of_a_parameter_comes_back_however_it_was_cut(cuts: list[int], part: tuple[str, int, int]) -> None:
    name, start, size = part
    size = min(size, SIZES[name] - start)
    with tempfile.TemporaryDirectory() as folder:
        index = written(Path(folder), cuts)
        assert read_index(Path(folder)) == index
        saved = SavedShards(Path(folder), index)
        wanted = Fragment(name, start, size, 0, 0)
        saved.check([wanted])
        assert torch.equal(saved.read(wanted, MASTER), FULL[name][start : start + size])


def test_the_step_is_that_of_the_rank_that_held_the_parameter(tmp_path: Path) -> None:
    saved = SavedShards(tmp_path, written(tmp_path, [8]))
    assert [saved.step_of(Fragment(name, 0, 1, 0, 0)) for name in SIZES] == [0.0, 0.0, 1.0]


def test_a_part_that_no_rank_has_is_refused(tmp_path: Path) -> None:
    index = written(tmp_path, [10])
    lost = replace(index, ranks=index.ranks[:1])
    saved = SavedShards(tmp_path, lost)
    saved.check([Fragment("c", 0, 2, 0, 0)])
    with pytest.raises(CheckpointError, match="lacks a part of parameter 'c'"):
        saved.check([Fragment("c", 0, 3, 0, 0)])


def test_only_the_files_that_are_needed_are_looked_at(tmp_path: Path) -> None:
    saved = SavedShards(tmp_path, written(tmp_path, [8]))
    (tmp_path / file_name("optimizer", 1)).write_bytes(b"damaged")
    saved.check([Fragment("a", 0, 7, 0, 0)])
    with pytest.raises(CheckpointError, match="optimizer-00001.safetensors is damaged"):
        saved.check([Fragment("c", 0, 1, 0, 0)])


def test_a_changed_number_in_the_index_is_noticed(tmp_path: Path) -> None:
    written(tmp_path, [])
    path = tmp_path / INDEX
    text = path.read_text()
    path.write_text(text.replace('"global_steps": 3', '"global_steps": 4'))
    assert path.read_text() != text
    with pytest.raises(CheckpointError, match="wrong checksum"):
        read_index(tmp_path)
