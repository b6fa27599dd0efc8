"""Lengths of the trajectories that trained and of those that were dropped: the bias of dropping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from opd_ray.types import Histogram

NUM_BINS = 20
EDGES = tuple(float(2**power) for power in range(NUM_BINS + 1))


class LengthReport:
    """Response lengths (tokens) since the start, in bins [2^i, 2^(i + 1)); the last bin takes all longer ones."""

    def __init__(self, kept: Iterable[int] = (), dropped: Iterable[int] = (), sums: Iterable[int] = (0, 0)) -> None:
        self._kept = list(kept) or [0] * NUM_BINS
        self._dropped = list(dropped) or [0] * NUM_BINS
        self._kept_tokens, self._dropped_tokens = sums

    def keep(self, num_response_tokens: int) -> None:
        """A trajectory had all its uses."""
        self._kept[_bin_of(num_response_tokens)] += 1
        self._kept_tokens += num_response_tokens

    def drop(self, num_response_tokens: int) -> None:
        """A stored trajectory was evicted before its last use."""
        self._dropped[_bin_of(num_response_tokens)] += 1
        self._dropped_tokens += num_response_tokens

    def as_metrics(self) -> dict[str, float | Histogram]:
        """Histograms ``{kept,dropped}_tokens/histogram`` of response lengths, and their means where there are any."""
        metrics: dict[str, float | Histogram] = {}
        for name, counts, tokens in (
            ("kept", self._kept, self._kept_tokens),
            ("dropped", self._dropped, self._dropped_tokens),
        ):
            metrics[f"{name}_tokens/histogram"] = Histogram(EDGES, tuple(float(count) for count in counts))
            if any(counts):
                metrics[f"{name}_tokens/mean"] = tokens / sum(counts)
        return metrics

    def as_dict(self) -> dict[str, list[int]]:
        """The counts, as `of` takes them."""
        sums = [self._kept_tokens, self._dropped_tokens]
        return {"kept": [*self._kept], "dropped": [*self._dropped], "sums": sums}

    @classmethod
    def of(cls, counts: Mapping[str, list[int]]) -> LengthReport:
        """What `as_dict` gave."""
        return cls(counts["kept"], counts["dropped"], counts["sums"])


def _bin_of(num_response_tokens: int) -> int:
    return min(max(num_response_tokens, 1).bit_length() - 1, NUM_BINS - 1)
