"""The ledger: every trajectory is accounted for, at every instant.

``started = trained + evicted + failed + in_store + in_flight``, where evicted and failed are kept by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from opd_ray.errors import LedgerError


class Ledger:
    """Counts of trajectories by what became of them."""

    def __init__(self) -> None:
        self.started = 0
        self.in_flight = 0
        self.in_store = 0
        self.trained = 0
        self.evicted: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    def start(self, count: int) -> None:
        """`count` trajectories were acquired."""
        self.started += count
        self.in_flight += count

    def store(self, count: int) -> None:
        """`count` trajectories came in from flight."""
        self.in_flight -= count
        self.in_store += count

    def fail(self, count: int, reason: str) -> None:
        """`count` trajectories in flight ended without a trajectory."""
        self.in_flight -= count
        self.failed[reason] += count

    def evict(self, count: int, reason: str) -> None:
        """`count` stored trajectories were dropped before their last use."""
        self.in_store -= count
        self.evicted[reason] += count

    def train(self, count: int) -> None:
        """`count` stored trajectories had all their uses and were retired."""
        self.in_store -= count
        self.trained += count

    def check(self, in_flight: int, in_store: int) -> None:
        """Compare the books with what is really there; raises `LedgerError` when they differ.

        `in_flight` and `in_store` are counted by whoever holds the trajectories.
        """
        accounted = self.trained + self.evicted.total() + self.failed.total() + in_store + in_flight
        books = (self.in_flight, self.in_store)
        if self.started != accounted or books != (in_flight, in_store) or min(books) < 0:
            raise LedgerError(
                f"{self.started} trajectories were started and {accounted} are accounted for "
                f"(trained {self.trained}, evicted {dict(self.evicted)}, failed {dict(self.failed)}; "
                f"in store {in_store}, booked {self.in_store}; "
                f"in flight {in_flight}, booked {self.in_flight}): report this as a fault of the store"
            )

    @classmethod
    def of(cls, books: Mapping[str, int]) -> Ledger:
        """The ledger that `as_dict` told of."""
        ledger = cls()
        for name in ("started", "trained", "in_store", "in_flight"):
            setattr(ledger, name, books[name])
        for kind, counts in (("evicted", ledger.evicted), ("failed", ledger.failed)):
            start = f"{kind}/"
            counts.update({key.removeprefix(start): count for key, count in books.items() if key.startswith(start)})
        return ledger

    def as_dict(self) -> dict[str, int]:
        """The books as one flat, JSON-able dict, with ``evicted/<reason>`` and ``failed/<reason>``."""
        flat = {
            "started": self.started,
            "trained": self.trained,
            "evicted": self.evicted.total(),
            "failed": self.failed.total(),
            "in_store": self.in_store,
            "in_flight": self.in_flight,
        }
        flat |= {f"evicted/{reason}": count for reason, count in sorted(self.evicted.items())}
        flat |= {f"failed/{reason}": count for reason, count in sorted(self.failed.items())}
        return flat
