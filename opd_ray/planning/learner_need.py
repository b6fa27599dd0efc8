"""Memory of one learner rank: DeepSpeed ZeRO as `learner.deepspeed_engine` sets it up, and one microbatch.

Mixed-precision Adam takes 2 + 2 + 12 bytes a parameter, and ZeRO stage 1 divides the 12, stage 2 also the gradients',
stage 3 also the weights' by the number of ranks (Rajbhandari et al., arXiv 1910.02054, section 3.1 and figure 1). Here
the float32 masters are kept in float32 training too (DeepSpeed clones each partition), so that it is 4 + 4 + 12.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from opd_ray.planning.activations import saved_bytes, support_bytes, transient_bytes
from opd_ray.planning.amounts import Amount, Origin, WorkerNeed, gib, least
from opd_ray.planning.model_shape import ModelShape
from opd_ray.planning.overheads import CUDA_CONTEXT, CUDA_PROCESS_HOST, LEARNER_PROCESS

# DeepSpeed's defaults, in elements: gradients reduced at once, and gathered parameters that stage 3 may keep.
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
# Positions and head rows of a tile of logits on an accelerator, float32 (`objective.lm_head_tiles`).
_TILE_BYTES = 1024 * 16384 * 4
_MAX_RANKS = 1024


@dataclass(frozen=True, slots=True)
class LearnerInput:
    """The learner's part of a plan; `item_bytes` and `publish_bytes` are of one element in training and in engines.

    `microbatch_tokens` are the padded tokens of the largest microbatch. `offload_optimizer`: masters, moments and their
    gradients lie in host memory (ZeRO-Offload, arXiv 2101.06840); `offload_parameters`: a stage-3 rank's weights too.
    """

    shape: ModelShape
    num_ranks: int
    gpus: float
    cpus: float
    zero_stage: int
    item_bytes: int
    publish_bytes: int
    microbatch_tokens: int
    top_k: int
    gradient_checkpointing: bool
    offload_optimizer: bool = False
    offload_parameters: bool = False


def learner_need(given: LearnerInput) -> WorkerNeed:
    """The need of one rank; rank 0, which also holds what it publishes, stands for all."""
    on_gpu = given.gpus > 0
    model, offloaded = _model_states(given)
    batch = _batch(given)
    published = Amount.possible(
        "published weights",
        given.shape.num_parameters * given.publish_bytes,
        "rank 0 packs all weights in the engines' dtype before it hands them over",
    )
    if on_gpu:
        device = (*model, *batch, Amount.possible("CUDA context", CUDA_CONTEXT, "no measurement", Origin.assumed))
        process = Amount.possible("process", CUDA_PROCESS_HOST, "Python, torch with CUDA, DeepSpeed", Origin.assumed)
        # `from_pretrained` makes the model in host memory before it goes to the GPU.
        loading = given.shape.num_parameters * given.item_bytes
        largest = Amount.possible("model while it is loaded", max(0.0, loading - published.expected), "then moved")
        host = (process, published, largest, *offloaded)
    else:
        device = ()
        process = Amount("process", LEARNER_PROCESS, LEARNER_PROCESS / 2, Origin.measured, "Python, torch, DeepSpeed")
        # Publishing comes when a step's states are free again: the larger of the two counts.
        spare = sum(amount.expected for amount in batch)
        extra = replace(published, expected=max(0.0, published.expected - spare))
        host = (process, *model, *offloaded, *batch, extra)
    return WorkerNeed("learner", given.num_ranks, given.gpus, given.cpus, device, host, _actions(given))


def _model_states(given: LearnerInput) -> tuple[tuple[Amount, ...], tuple[Amount, ...]]:
    """Weights, gradients and optimizer state where the rank computes; and the part that offload moves to the host."""
    total, ranks, size, stage = given.shape.num_parameters, given.num_ranks, given.item_bytes, given.zero_stage
    part = total / ranks
    # On a GPU the whole bucket is allocated; on CPU its untouched pages take nothing.
    bucket = (REDUCE_BUCKET if given.gpus else min(REDUCE_BUCKET, total)) * size
    weights = Amount.certain("weights", total * size, f"{total:,} parameters x {size} bytes, whole on every rank")
    if stage == 3:
        weights = Amount.certain("weights", part * size, f"{total:,} parameters x {size} bytes / {ranks} ranks")
    whole = total * size if stage == 1 else part * size
    words = f"x {size} bytes, " + ("whole (stage 1)" if stage == 1 else f"/ {ranks} ranks (stage {stage})")
    gradients = Amount.certain("gradients", whole, words)
    # The bucket that is reduced, the gradients that wait for it, and the partition that stays.
    reduction = bucket + (part * size if stage == 1 else bucket if ranks > 1 else 0)
    states = Amount.certain("masters, moments", 12 * part, f"float32 master and AdamW's two / {ranks} ranks")
    # In float32 training the partition is used as it is.
    widened = 4 * part if size < 4 or given.offload_optimizer else 0
    step = Amount.possible("gradients' partition in float32", widened, "at a step")
    buckets = Amount("reduction buckets", reduction, bucket, Origin.computed, "DeepSpeed's default of 5e8 elements")
    here = [gradients, buckets]
    if stage == 3:
        live = min(total, MAX_LIVE_PARAMETERS) * size
        least_live = min(given.shape.largest_parameter, total) * size
        how = "parameters of other ranks while they are used, at most 1e9"
        here.append(Amount("gathered weights", live, least_live, Origin.computed, how))
    there: list[Amount] = []
    (there if given.offload_parameters else here).insert(0, weights)
    (there if given.offload_optimizer else here).extend((states, step))
    return tuple(here), tuple(there)


def _batch(given: LearnerInput) -> tuple[Amount, ...]:
    shape, size, tokens = given.shape, given.item_bytes, given.microbatch_tokens
    saved = tokens * saved_bytes(shape, size, checkpointing=given.gradient_checkpointing)
    passing = tokens * transient_bytes(shape, size, checkpointing=given.gradient_checkpointing)
    # The support's rows, a tile of logits for drift, and the head's own gradient [V, H] beside the accumulated one.
    head = tokens * (support_bytes(given.top_k) + size * shape.hidden) + shape.largest_parameter * size
    head += _TILE_BYTES if given.gpus else _TILE_BYTES // 8
    words = "inputs of layers" if given.gradient_checkpointing else "states of all layers"
    return (
        Amount.possible("activations", saved, f"{tokens:,} tokens of a microbatch x {words}"),
        Amount.possible("one layer's gradients", passing, "in the backward pass"),
        Amount.possible("LM head", head, f"{given.top_k} support rows a position, a tile of logits, its gradient"),
    )


def _actions(given: LearnerInput) -> str:
    first = "" if given.gradient_checkpointing else "set learner.gradient_checkpointing=true, or "
    more = [f"learner.num_ranks > {given.num_ranks}"]
    if given.zero_stage < 3:
        more.append("learner.zero_stage=3")
    if given.item_bytes == 4:
        more.append("learner.dtype=bfloat16")
    if not given.offload_optimizer and given.gpus:
        more.append("learner.offload=optimizer")
    return f"{first}lower learner.tokens_per_microbatch, or set one of {', '.join(more)}"


def remedy(given: LearnerInput, have: float) -> str:
    """The mildest setting whose least need fits `have` bytes of a GPU, in words; what lowers it, where none does."""
    ranks = given.num_ranks
    while ranks <= _MAX_RANKS:
        for stage in sorted({given.zero_stage, 2, 3} - set(range(given.zero_stage))):
            tried = replace(given, num_ranks=ranks, zero_stage=stage)
            needed = least(learner_need(tried).device)
            if needed <= have and tried != given:
                keys = [f"learner.num_ranks={ranks}"] if ranks != given.num_ranks else []
                keys += [f"learner.zero_stage={stage}"] if stage != given.zero_stage else []
                return f"set {' '.join(keys)} (at least {gib(needed)} each)"
        ranks *= 2
    return _actions(given)
