"""Made-up uses of a recorded trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from opd_ray.run.trajectory_records import RecordedUse

SETTINGS: dict[str, Any] = {
    "objective": {"kind": "lsm", "mask_rules": []},
    "gate": {
        "kind": "block",
        "block_size": 8,
        "tau": 1.0,
        "tau_mode": "fixed",
        "statistic": "signed_mean",
        "control": "none",
    },
}


def made_use(
    pieces: Sequence[str], *, trajectory_id: int = 3, step: int = 2, use: int = 2, top_k: int = 4, **changes: Any
) -> RecordedUse:
    """A second use whose numbers are random but hang together; `changes` replace fields."""
    num_tokens, vocabulary = len(pieces), max(50, top_k + 1)
    rng = np.random.default_rng(trajectory_id)  # of the trajectory: what the teacher says is the same at each use
    ids = rng.integers(0, vocabulary, num_tokens)
    support = rng.permuted(np.tile(np.arange(vocabulary), (num_tokens, 1)), axis=1)[:, :top_k]
    teacher = np.log(np.sort(rng.dirichlet(np.ones(top_k + 1), num_tokens), axis=1)[:, :0:-1])
    engine, teacher_sampled = -rng.exponential(1.0, num_tokens), -rng.exponential(1.0, num_tokens)
    rng = np.random.default_rng([trajectory_id, step])
    student = np.log(np.sort(rng.dirichlet(np.ones(top_k + 1), num_tokens), axis=1)[:, :0:-1])
    drift = np.zeros(num_tokens) if use == 1 else rng.normal(0, 0.1, num_tokens)
    segments = np.arange(num_tokens) // 8
    segment_drift = np.array([drift[segments == number].mean() for number in range(segments.max() + 1)])
    gate = np.exp(-np.abs(segment_drift))

    def floats(values: Any) -> Any:
        return np.asarray(values, dtype=np.float32)

    made = RecordedUse(
        trajectory_id=trajectory_id,
        step=step,
        use=use,
        staleness=use - 1,
        is_fresh=use == 1,
        is_measured=use > 1,
        behavior_from_engine=False,
        tau=1.0,
        prompt_id=f"p{trajectory_id}",
        finish_reason="stop",
        temperature=1.0,
        top_p=0.9,
        prompt_token_ids=np.array([1, 2, 3]),
        prompt_text="What is 6 times 7?",
        response_token_ids=ids,
        response_pieces=tuple(pieces),
        token_versions=np.arange(num_tokens) * 2 // max(num_tokens, 1),
        mask=np.ones(num_tokens, dtype=np.bool_),
        engine_logprobs=floats(engine),
        behavior_logprobs=floats(engine),
        current_logprobs=floats(engine + drift),
        teacher_logprobs=floats(teacher_sampled),
        drift=floats(drift),
        token_weights=floats((gate / gate.mean())[segments]),
        losses=floats(rng.exponential(0.1, num_tokens)),
        kl=floats(rng.exponential(0.1, num_tokens)),
        entropy=floats(rng.exponential(0.5, num_tokens)),
        segment_ids=segments,
        segment_drift=floats(segment_drift),
        segment_gate=floats(gate),
        segment_tokens=np.bincount(segments),
        teacher_topk_ids=support,
        teacher_topk_logprobs=floats(teacher),
        student_at_support_logprobs=floats(student),
        student_topk_ids=support[:, ::-1].copy(),
        student_topk_logprobs=floats(student),
        text_ids=np.arange(vocabulary),
        texts=tuple(f"<{token_id}>" for token_id in range(vocabulary)),
    )
    return replace(made, **changes)
