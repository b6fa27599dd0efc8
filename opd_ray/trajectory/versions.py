"""Policy versions of a response's tokens: one per token, or as run-length segments.

Segment s covers the response positions from ``starts[s]`` up to ``starts[s + 1]`` (the last: to the end).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def version_segments(
    token_versions: Sequence[int] | npt.NDArray[np.integer],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Run-length form of per-token versions [T]: starts int32 [S] and values int64 [S]."""
    versions = np.asarray(token_versions, dtype=np.int64)
    changes = np.flatnonzero(np.diff(versions)) + 1
    starts = np.concatenate([np.zeros(min(1, len(versions)), dtype=np.int64), changes])
    return starts.astype(np.int32), versions[starts]


def expand_versions(
    starts: npt.NDArray[np.int32], values: npt.NDArray[np.int64], num_tokens: int
) -> npt.NDArray[np.int64]:
    """Version of every token, int64 [num_tokens], from the run-length form."""
    return np.repeat(values, np.diff(starts, append=num_tokens))
