"""One HTML page of a trajectory's text at all of its uses, with the numbers of every token in it.

The page needs no network and nothing beside itself. Per-token numbers are little-endian arrays in base64, log-probs of
the top-K lists rounded to 1/1024 nats, so that a response of 16k tokens with K = 32 opens at once.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from opd_ray.errors import DataError
from opd_ray.run.trajectory_records import RecordedUse

_TEMPLATES = Path(__file__).parent / "templates"
_FLOATS = ("drift", "token_weights", "losses", "kl", "entropy", "behavior_logprobs", "current_logprobs")
_STEPS_PER_NAT = 1024
_DRIFT_GATES = ("token", "block", "sequence", "newline")
_BASELINES = {
    "tis": ("cap",),
    "icepop": ("low", "high"),
    "geometric_mask": ("low", "high"),
    "hard_drop": ("block_size", "drop_above"),
}


def trajectory_page(
    uses: Sequence[RecordedUse], opens_at: int, *, run: str, settings: Mapping[str, Mapping[str, Any]]
) -> str:
    """The page of one trajectory, as HTML.

    Args:
        uses: its uses, at least one, in order of step.
        opens_at: place in `uses` of the one that the page shows first.
        run: name of the run.
        settings: keys ``objective`` and ``gate``, as they stand in the record.

    Raises:
        DataError: the uses are of several trajectories.
    """
    first = uses[0]
    for other in uses:
        if other.trajectory_id != first.trajectory_id or not np.array_equal(
            other.response_token_ids, first.response_token_ids
        ):
            raise DataError(
                f"id {first.trajectory_id} stands for several trajectories: name one step of it with step=N"
            )
    texts = _texts(uses)
    known = np.array(sorted(texts), dtype=np.int64)
    data = {
        "opensAt": opens_at,
        "pieces": first.response_pieces,
        "numSupport": first.teacher_topk_ids.shape[1],
        "texts": [texts[token_id] for token_id in known],
        "textIds": _packed(known, "uint32"),
        "tokenIds": _packed(first.response_token_ids, "uint32"),
        "versions": _packed(first.token_versions, "int32"),
        "engine_logprobs": _packed(first.engine_logprobs, "float32"),
        "teacher_logprobs": _packed(first.teacher_logprobs, "float32"),
        "teacherIds": _places(first.teacher_topk_ids, known),
        "teacherLogprobs": _rounded(first.teacher_topk_logprobs),
        "isGated": settings["gate"]["kind"] != "off",
        "hasTau": settings["gate"]["kind"] in _DRIFT_GATES,
        "uses": [_use_data(use, known) for use in uses],
    }
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("trajectory.html.j2").render(
        run=run, first=first, uses=uses, facts=_facts(first, settings), data=data
    )


def _use_data(use: RecordedUse, known: npt.NDArray[np.int64]) -> dict[str, Any]:
    """What the page's script knows of a use; `known` are the ids that have a text."""
    return {
        "step": use.step,
        "use": use.use,
        "staleness": use.staleness,
        "tau": use.tau,
        "isFresh": use.is_fresh,
        "isMeasured": use.is_measured,
        "behaviorFromEngine": use.behavior_from_engine,
        "mask": _packed(use.mask, "uint8"),
        "segments": _packed(use.segment_ids, "int32"),
        "segmentDrift": _packed(use.segment_drift, "float32"),
        "segmentGate": _packed(use.segment_gate, "float32"),
        "segmentTokens": _packed(use.segment_tokens, "int32"),
        "studentLogprobs": _rounded(use.student_at_support_logprobs),
        "ownIds": _places(use.student_topk_ids, known),
        "ownLogprobs": _rounded(use.student_topk_logprobs),
        **{name: _packed(getattr(use, name), "float32") for name in _FLOATS},
    }


def _texts(uses: Sequence[RecordedUse]) -> dict[int, str]:
    """The text of every id that a top-K list names."""
    pairs = (pair for use in uses for pair in zip(use.text_ids.tolist(), use.texts, strict=True))
    return {int(token_id): text for token_id, text in pairs}


def _places(token_ids: npt.NDArray[np.int64], known: npt.NDArray[np.int64]) -> dict[str, str]:
    """Where the ids stand in `known`, which is in order: two bytes each wherever that is enough."""
    return _packed(np.searchsorted(known, token_ids), "uint16" if len(known) <= 1 << 16 else "uint32")


def _facts(first: RecordedUse, settings: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What the page's head says of the trajectory and the settings."""
    objective, gate = settings["objective"], settings["gate"]
    versions = sorted({int(version) for version in first.token_versions})
    sampled = f"{versions[0]}" if len(versions) == 1 else f"{versions[0]} to {versions[-1]}"
    facts = [
        ("prompt", first.prompt_id),
        ("response", f"{len(first.response_pieces)} tokens, ended by {first.finish_reason}"),
        ("sampled by policy version", sampled),
        ("sampling", f"temperature {first.temperature:g}, top-p {first.top_p:g}"),
        ("objective", str(objective["kind"])),
        ("gate", _gate_text(gate)),
    ]
    masks = [f"{rule}" for rule in objective.get("mask_rules", [])]
    return [*facts, ("mask rules", ", ".join(masks))] if masks else facts


def _gate_text(gate: Mapping[str, Any]) -> str:
    kind = str(gate["kind"])
    if kind in _DRIFT_GATES:
        size = f" of {gate['block_size']}" if kind == "block" else ""
        parts = [f"{kind}{size}", f"τ {gate['tau']:g} ({gate['tau_mode']})", str(gate["statistic"])]
        return ", ".join([*parts, *([f"control: {gate['control']}"] if gate["control"] != "none" else [])])
    return ", ".join([kind.replace("_", " "), *(f"{name} {gate[name]:g}" for name in _BASELINES.get(kind, ()))])


def _packed(values: npt.NDArray[Any], dtype: str) -> dict[str, str]:
    """An array for the page's script; values beyond an integer type's range do not occur."""
    data = np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()
    return {"type": dtype, "data": base64.b64encode(data).decode("ascii")}


def _rounded(logprobs: npt.NDArray[np.float32]) -> dict[str, str]:
    """Log-probs as steps of 1/1024 nats below 0, up to 64 nats; NaN and -inf are the lowest."""
    steps = np.nan_to_num(-logprobs * _STEPS_PER_NAT, nan=np.inf, posinf=np.inf)
    return _packed(np.clip(np.rint(steps), 0, np.iinfo(np.uint16).max), "uint16")
