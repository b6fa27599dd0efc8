"""Sharpness of the gate: tau that follows staleness, or the scale of the measured drift.

tau is in 1/nats; the gate of a segment is exp(-tau |s|) (`drift_gate`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ray.objective.inputs import require_rank, require_same_shape


def segment_staleness(token_staleness: Tensor, response_mask: Tensor, segment_ids: Tensor) -> Tensor:
    """Return the staleness of each segment's oldest valid token.

    Args:
        token_staleness: `[B,T]`, policy versions between each token's sampling and now, >= 0.
        response_mask: `[B,T]`, bool or 0/1; other tokens may hold anything.
        segment_ids: `[B,T]` integers, negative = no segment.

    Returns:
        `[B,S]`, dtype of `token_staleness`, with S = ``segment_ids.max() + 1``; 0 without valid tokens.

    Raises:
        ValueError: shapes differ or are not `[B,T]`, or a valid token has a negative or NaN staleness.
    """
    require_rank("token_staleness", token_staleness, 2, "[B,T]")
    require_same_shape(token_staleness=token_staleness, response_mask=response_mask, segment_ids=segment_ids)
    valid = (response_mask > 0) & (segment_ids >= 0)
    staleness = torch.where(valid, token_staleness, 0)
    if not bool((staleness >= 0).all()):
        raise ValueError(
            "token_staleness is negative or NaN at a valid token; a token cannot be newer than the learner"
        )
    size = int(segment_ids.max()) + 1 if segment_ids.numel() else 0
    oldest = staleness.new_zeros((segment_ids.shape[0], size))
    return oldest.scatter_reduce_(1, segment_ids.clamp(min=0).long(), staleness, "amax") if size else oldest


def staleness_tau(tau: float, segment_staleness: Tensor) -> Tensor:
    """Return tau times staleness: fresh segments are not gated, older ones the harder the older they are.

    Args:
        tau: at staleness 1, in 1/nats, finite, >= 0.
        segment_staleness: `[B,S]` (any shape), see the function of that name.

    Returns:
        Same shape, float64.

    Raises:
        ValueError: a tau that is negative or not finite.
    """
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau is {tau}; use a finite number of at least 0")
    return tau * segment_staleness.double()


def quantile_tau(scale: float, value: float | None) -> float:
    """Return scale / value: a drift of the typical size `value` is gated by exp(-scale).

    Scale-free, because drift after one step can be 1e-3 nats, where a tau of 1 does nothing.

    Args:
        scale: tau times |s| at the typical drift, finite, >= 0.
        value: typical |s| in nats (`RunningQuantile.value`), or None.

    Returns:
        tau in 1/nats; 0.0 (ungated) while `value` is None or 0, or so small that tau would overflow.

    Raises:
        ValueError: a scale that is negative or not finite, or a value that is negative or NaN.
    """
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale is {scale}; use a finite number of at least 0")
    if value is None or value == 0:
        return 0.0
    if not value > 0:
        raise ValueError(f"value is {value}; give the magnitude of the drift, which is not negative")
    tau = scale / value
    return tau if tau < math.inf else 0.0


class RunningQuantile:
    """A quantile of |s| over tokens, averaged over steps: the typical drift of a segment.

    Each step's quantile is folded into an exponential average whose weights always add up to 1, so that it is
    not drawn towards 0 in the beginning: after n steps, step i weighs decay^(n - i) over their sum. A step's
    quantile is the smallest |s| with at least the given share of the step's tokens at or below it.

    Attributes:
        value: the average in nats, None before the first step with tokens.
    """

    def __init__(self, quantile: float, decay: float) -> None:
        """Start without a value.

        Args:
            quantile: share of the tokens, in [0, 1].
            decay: weight of the past against a new step, in [0, 1); 0 keeps the last step only.

        Raises:
            ValueError: an argument out of range.
        """
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile is {quantile}; use a number in [0, 1]")
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; use a number of at least 0 and below 1")
        self._quantile = quantile
        self._decay = decay
        self._num_updates = 0
        self.value: float | None = None

    def update(self, drift_abs: Tensor, num_tokens: Tensor) -> None:
        """Fold in one step.

        Args:
            drift_abs: `[S]`, |s| of the step's segments in nats (a sign is dropped), all shards together.
            num_tokens: `[S]` integers >= 0, valid tokens of each; 0 leaves a segment out, as for fresh ones,
                whose drift is 0 by definition. Segments whose drift is not finite are left out as well; a step
                without any other changes nothing.

        Raises:
            ValueError: shapes that differ or are not `[S]`.
        """
        require_rank("drift_abs", drift_abs, 1, "[S]")
        require_same_shape(drift_abs=drift_abs, num_tokens=num_tokens)
        drift = drift_abs.detach().double().abs()
        used = (num_tokens > 0) & drift.isfinite()
        drift, order = drift[used].sort()
        if drift.numel() == 0:
            return
        below = num_tokens[used][order].long().cumsum(0)
        wanted = self._quantile * int(below[-1]) * (1 - 1e-12)  # 0.7 of 10 tokens is 7, however it is rounded
        step = float(drift[int((below < wanted).sum())])
        self._num_updates += 1
        share = (1 - self._decay) / (1 - self._decay**self._num_updates)
        self.value = step if self.value is None else self.value + share * (step - self.value)

    def state_dict(self) -> dict[str, float | int | None]:
        """What a resumed run needs: `value` and `num_updates`."""
        return {"value": self.value, "num_updates": self._num_updates}

    def load_state_dict(self, state: dict[str, float | int | None]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: the state lacks a key, or value and count do not fit.
        """
        value, count = state.get("value"), state.get("num_updates")
        if not isinstance(count, int) or count < 0 or (value is None) != (count == 0):
            raise ValueError(f"the quantile's state is {state}; give what state_dict returned: value and num_updates")
        self._num_updates = count
        self.value = None if value is None else float(value)
