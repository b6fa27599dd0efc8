"""Statistics of a segment's drift by the name of `gate.statistic`, one module each.

A module defines ``statistic(drift, mean)``, which returns the statistic of each segment `[B,S]` in nats. `drift`
`[B,T]` float64 is current minus behaviour log-prob, 0 where it was not measured; `mean` averages values `[B,T]` over
the measured tokens of each segment.
"""

from collections.abc import Callable

from torch import Tensor

SegmentMean = Callable[[Tensor], Tensor]
