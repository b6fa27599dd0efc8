"""The names that config keys may take. A member equals its name, as written on the command line."""

from __future__ import annotations

from enum import StrEnum


class OnNewWeights(StrEnum):
    """What becomes of an engine's running requests when new weights arrive.

    `partial`: they continue with the new weights, and each token says which version made it; `finish`: they end with
    the old weights first; `abort`: they are thrown away and sampled again from the start with the new weights.
    """

    partial = "partial"
    finish = "finish"
    abort = "abort"


class Support(StrEnum):
    """Whose K most probable ids the teacher scores: its own, or the sampling student's."""

    teacher_topk = "teacher_topk"
    student_topk = "student_topk"


class TeacherBackend(StrEnum):
    """What runs the teacher: `transformers`, in the worker's own process, or a `vllm` engine, which can be split."""

    transformers = "transformers"
    vllm = "vllm"


class PlacementStrategy(StrEnum):
    """How a group's workers lie on nodes: together if they can (`pack`), apart if they can (`spread`), or `strict_`."""

    pack = "pack"
    spread = "spread"
    strict_pack = "strict_pack"
    strict_spread = "strict_spread"


class Offload(StrEnum):
    """What DeepSpeed keeps in host memory: nothing, the `optimizer`'s state, or the parameters too (ZeRO 3)."""

    none = "none"
    optimizer = "optimizer"
    parameters = "parameters"


class Direction(StrEnum):
    """`forward`: KL(teacher || student); `reverse`: KL(student || teacher)."""

    forward = "forward"
    reverse = "reverse"


class MaskRule(StrEnum):
    """Response tokens that leave the loss.

    `first_think_and_end`: the first occurrence of each token of "<", "think" and "<|im_end|>" (the code of arXiv
    2603.25562); `end_of_sequence`: every end-of-sequence token; `special_tokens`: every special token of the tokenizer.
    """

    first_think_and_end = "first_think_and_end"
    end_of_sequence = "end_of_sequence"
    special_tokens = "special_tokens"


class Advantage(StrEnum):
    """`frozen`: log q - log pi_behavior (the paper); `recompute`: log q - log pi_current (AsyncOPD)."""

    frozen = "frozen"
    recompute = "recompute"


class GateKind(StrEnum):
    """What weighs the tokens.

    Drift gates by segment: `token`, `block`, `sequence`, `newline`. What they are compared with: `off`, truncated
    importance sampling (`tis`), `icepop`, the geometric sequence mask, and `hard_drop`, which drops blocks whole.
    """

    off = "off"
    token = "token"
    block = "block"
    sequence = "sequence"
    newline = "newline"
    tis = "tis"
    icepop = "icepop"
    geometric_mask = "geometric_mask"
    hard_drop = "hard_drop"

    @property
    def is_drift_gate(self) -> bool:
        """exp(-tau * drift), rather than one of the baselines."""
        return self in (GateKind.token, GateKind.block, GateKind.sequence, GateKind.newline)


class TauMode(StrEnum):
    """`fixed`: tau itself; `staleness`: tau times the segment's staleness; `quantile`: tau over its quantile."""

    fixed = "fixed"
    staleness = "staleness"
    quantile = "quantile"


class GateControl(StrEnum):
    """Controls that tell gating from re-weighting noise: the step's gates permuted, or drawn again from them."""

    none = "none"
    shuffle = "shuffle"
    noise = "noise"


class GateNormalize(StrEnum):
    """Over which tokens the weights average to one; `none` leaves them as they are and divides by the token count."""

    step = "step"
    sequence = "sequence"
    none = "none"


class BehaviorSource(StrEnum):
    """Whose log-probs stand for the behaviour student in the drift: the engine's or the learner's own first use."""

    rollout = "rollout"
    learner = "learner"


class Dtype(StrEnum):
    """Floating point type of a model's weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class LogprobDtype(StrEnum):
    """Floating point type of stored log-probs."""

    float32 = "float32"
    float16 = "float16"


class HeadKernel(StrEnum):
    """How the learner reads the support's rows of the LM head: the reference in torch, or a Triton kernel (GPUs)."""

    torch = "torch"
    triton = "triton"


class ReplayOrder(StrEnum):
    """Which ready trajectories train next.

    `fifo`: the oldest trajectories; `freshest`: those with the newest policy version; `weighted`: a seeded draw with
    weight 1 / (1 + staleness).
    """

    fifo = "fifo"
    freshest = "freshest"
    weighted = "weighted"


class StalePolicy(StrEnum):
    """What becomes of slow trajectories.

    `wait`: the learner waits for them, none is overtaken or dropped; `drop`: they are overtaken, and dropped above
    `replay.max_staleness`; `gate`: overtaken, and left to the gate up to `replay.hard_staleness`.
    """

    wait = "wait"
    drop = "drop"
    gate = "gate"


class LrSchedule(StrEnum):
    """Learning-rate schedule after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Template(StrEnum):
    """How a prompt becomes text (`data.templates`)."""

    completion = "completion"
    chat = "chat"
    plain_chat = "plain_chat"
    boxed_chat = "boxed_chat"
    chat_with_solution = "chat_with_solution"
    completion_with_solution = "completion_with_solution"


class Overlong(StrEnum):
    """What happens to a prompt longer than `data.max_prompt_tokens`."""

    error = "error"
    drop = "drop"


class AnswerFormat(StrEnum):
    r"""Where the final answer stands in a response (`evaluation.answers`).

    `tiny`: ``#n`` on the last line; `last_number`: the number after the last ``####``, else the last number;
    `hash_number`: after the last ``####`` only; `boxed`: the last ``\boxed{}``.
    """

    tiny = "tiny"
    last_number = "last_number"
    hash_number = "hash_number"
    boxed = "boxed"


class WandbMode(StrEnum):
    """`auto` is online when an API key is configured and offline otherwise."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"
