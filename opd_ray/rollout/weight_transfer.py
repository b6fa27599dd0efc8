"""A backend of vLLM's weight-transfer API that loads buckets from Ray's object store (the library has none for CPU).

vLLM repacks weights after loading, so a session is opened with a layerwise reload and closed by finalising it.
Imported in rollout workers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from opd_ray.models.weights import WeightBucket, unpack_bucket

BACKEND = "opd_object_store"
WORKER_EXTENSION = "opd_ray.rollout.engine_process.EngineProcess"


@dataclass
class ObjectStoreInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: the buckets arrive with each update."""


@dataclass
class ObjectStoreUpdateInfo(WeightTransferUpdateInfo):
    """One bucket of weights in checkpoint names and shapes."""

    bucket: WeightBucket


class ObjectStoreWeightTransferEngine(WeightTransferEngine[ObjectStoreInitInfo, ObjectStoreUpdateInfo]):
    """Loads `WeightBucket`s into the running model."""

    init_info_cls = ObjectStoreInitInfo
    update_info_cls = ObjectStoreUpdateInfo

    def init_transfer_engine(self, init_info: ObjectStoreInitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Bring the model back to checkpoint layout."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket; the base class would synchronise an accelerator, which a CPU build lacks."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
        """Load one bucket through the model's own checkpoint loader."""
        model: Any = self.model
        model.load_weights(unpack_bucket(update_info.bucket))

    def finish_weight_update(self) -> None:
        """Repack the weights for inference."""
        finalize_layerwise_reload(self.model, self.model_config)  # type: ignore[no-untyped-call]

    def shutdown(self) -> None:
        """Nothing to release."""


def register() -> None:
    """Make the backend known to vLLM in this process; safe to call again."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, ObjectStoreWeightTransferEngine)
