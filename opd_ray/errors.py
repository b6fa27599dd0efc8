"""The tree of errors that `opd_ray` raises.

Each message says what is wrong, gives the numbers, and ends with what to change. Every class takes exactly one message,
so that an instance keeps its type when it travels from an actor to the driver (pickle calls ``cls(*args)``).
"""

from __future__ import annotations


class OpdError(Exception):
    """Base of all errors that a user of `opd_ray` can cause or meet; ``str(error)`` is one clear line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ConfigError(OpdError, ValueError):
    """A config value is missing, of the wrong type, out of range, or contradicts another one."""


class DataError(OpdError, ValueError):
    """A prompt file is missing, empty or malformed, or a prompt does not fit the limits."""


class ModelError(OpdError, ValueError):
    """A model folder cannot be loaded, or student and teacher do not fit together."""


class ResourceError(OpdError, RuntimeError):
    """The run asks for more CPUs, GPUs or ranks than there are."""


class RunFolderError(OpdError, OSError):
    """The run folder cannot be created or written."""


class SchemaError(OpdError, ValueError):
    """A trajectory batch does not have the columns, types or metadata of its schema."""


class StaleBatchError(OpdError, RuntimeError):
    """A trajectory above the staleness bound reached its use: a fault of the program, not of the run."""


class LedgerError(OpdError, RuntimeError):
    """The ledger's books do not balance: a trajectory was lost or counted twice."""


class StoreError(OpdError, RuntimeError):
    """A call that the replay store's protocol does not allow: a fault of the program, not of the run."""


class StoreClosedError(StoreError):
    """The replay store takes no more requests: it was closed, or its data have ended."""


class CheckpointError(OpdError, ValueError):
    """A checkpoint cannot be written, or the one to resume from is missing, damaged, or of another run or version."""


class PayloadLostError(OpdError, RuntimeError):
    """Bytes in Ray's object store are gone with the node that held them; whoever needs them has them made again."""


class WeightSyncError(OpdError, RuntimeError):
    """A rollout engine did not take over the published weights: version or checksum differ."""


class DivergedError(OpdError, RuntimeError):
    """The loss or the gradient norm is not finite."""


class ActorError(OpdError, RuntimeError):
    """An actor died, failed or missed its deadline."""


class ActorDiedError(ActorError):
    """An actor's process ended; a new one can take its place."""


class LearnerLostError(ActorDiedError):
    """A learner rank died: the group continues from the last checkpoint, and everything after it is lost."""


class DeadlineError(ActorError):
    """An actor gave no answer in time: it hangs, or the deadline is too short for its work."""


class VerifierError(OpdError, RuntimeError):
    """The process that verifies answers cannot be started: a broken installation, or no memory."""
