"""Tokens/s of the whole learner step for the paper's six variants, and where the time goes.

``python -m benchmarks.bench_learner [--model FOLDER] [--data FILE.jsonl] [--out FILE.json]``

One rank, in this process, on real trajectories: prompt and response texts of `--data` (columns `problem` and `solution`
or `answer`), scored once by the model itself as its teacher. Each variant makes one fresh use and then second uses,
which is what a run with reuse does. Tokens are response tokens that carry loss. The last line is the record as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine, spread
from opd_ray.config.choices import Dtype, GateKind
from opd_ray.config.schema import (
    GateConfig,
    LearnerConfig,
    ObjectiveConfig,
    ReplayConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)
from opd_ray.data.packing import plan_microbatches
from opd_ray.learner.spec import LearnerSpec, rank_batches
from opd_ray.learner.step_report import RankReport
from opd_ray.models.tokenization import load_tokenizer, tokenizer_fingerprint
from opd_ray.replay.batch import SampledBatch
from opd_ray.teacher.worker import TeacherSpec, TeacherWorker
from opd_ray.trajectory.codec import decode, encode_rollouts
from opd_ray.trajectory.rows import RolloutRow, scored_rows
from opd_ray.trajectory.schema import BatchSpec
from opd_ray.types import BatchMeta, Prompt, SampleInfo

VARIANTS = {
    "opd": ("opd", GateKind.off),
    "opd_block64": ("opd", GateKind.block),
    "opd_newline": ("opd", GateKind.newline),
    "lsm": ("lsm", GateKind.off),
    "lsm_block64": ("lsm", GateKind.block),
    "lsm_newline": ("lsm", GateKind.newline),
}
PARTS = ("pack", "forward", "gate", "loss", "diagnostics", "backward", "optimizer")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="model folder")
    parser.add_argument("--data", default="gsm8k_train.jsonl", help="JSONL with problem and solution or answer")
    parser.add_argument("--trajectories", type=int, default=8)
    parser.add_argument("--max-response-tokens", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--tokens-per-microbatch", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=3, help="second uses a variant")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, help="write the record here too")
    return parser.parse_args()


def scored_payload(args: argparse.Namespace) -> Any:
    """The trajectories as a scored batch."""
    tokenizer: Any = load_tokenizer(args.model)
    fingerprint = tokenizer_fingerprint(tokenizer)
    rows, prompts = [], []
    with open(args.data, encoding="utf-8") as lines:
        records = [json.loads(line) for _, line in zip(range(args.trajectories), lines, strict=False)]
    for trajectory_id, record in enumerate(records):
        text = str(record.get("solution") or record["answer"])
        response = tokenizer(text)["input_ids"][: args.max_response_tokens]
        prompts.append(Prompt(id=str(trajectory_id), problem=str(record["problem"])))
        rows.append(
            RolloutRow(
                trajectory_id=trajectory_id,
                prompt_id=str(trajectory_id),
                prompt_token_ids=np.array(tokenizer(record["problem"])["input_ids"], dtype=np.int32),
                response_token_ids=np.array(response, dtype=np.int32),
                behavior_logprobs=np.full(len(response), -1.0, dtype=np.float32),
                version_starts=np.zeros(1, dtype=np.int32),
                version_values=np.zeros(1, dtype=np.int64),
                finish_reason="stop",
                temperature=1.0,
                top_p=1.0,
            )
        )
    payload = encode_rollouts(rows, BatchSpec(fingerprint))
    cfg = RunConfig(teacher=TeacherConfig(top_k=args.top_k, max_batch_tokens=4096))
    spec = TeacherSpec(cfg, "teacher-0", args.model, len(tokenizer), fingerprint, torch.get_num_threads())
    teacher = TeacherWorker(spec)
    return teacher.score(payload, BatchMeta((), "rollout-0", 0.0, payload.size), prompts)[0]


def train(args: argparse.Namespace, variant: str, payload: Any) -> list[RankReport]:
    """One fresh use and the second uses of a variant."""
    from opd_ray.learner.trainer import Trainer

    objective, gate = VARIANTS[variant]
    cfg = RunConfig(
        num_steps=1000,
        student=StudentConfig(dtype=Dtype[args.dtype]),
        learner=LearnerConfig(dtype=Dtype[args.dtype], lr=1e-6, tokens_per_microbatch=args.tokens_per_microbatch),
        objective=ObjectiveConfig(kind=objective),
        gate=GateConfig(kind=gate),
        replay=ReplayConfig(reuse=1000),
    )
    trainer = Trainer(LearnerSpec(cfg, 0, args.model, torch.get_num_threads()))
    rows = scored_rows(decode(payload))
    lengths = [len(row.prompt_token_ids) + len(row.response_token_ids) for row in rows]
    plan = plan_microbatches(lengths, 1, args.tokens_per_microbatch)
    reports = []
    for version in range(1 + args.repeats):
        infos = tuple(
            SampleInfo(
                row.trajectory_id, version, version + 1, 0.0, len(row.prompt_token_ids), len(row.response_token_ids)
            )
            for row in rows
        )
        batch = SampledBatch((payload,), tuple((0, index) for index in range(len(rows))), infos)
        ((part, payloads),) = rank_batches(batch, plan, version, cfg.replay.reuse)
        reports.append(trainer.train_step(part, payloads))
    return reports


def figures(reports: list[RankReport]) -> dict[str, Any]:
    """Tokens/s of the fresh use and of second uses, and each part's share of a second use."""
    fresh, later = reports[0], reports[1:]
    return {
        "loss_tokens": fresh.num_tokens,
        "model_tokens": fresh.model_tokens,
        "fresh_use_tokens_per_s": fresh.num_tokens / fresh.times["step"],
        "second_use_tokens_per_s": spread([r.num_tokens / r.times["step"] for r in later]),
        "model_tokens_per_s": spread([r.model_tokens / r.times["step"] for r in later]),
        "share": {part: statistics.median(r.times.get(part, 0.0) / r.times["step"] for r in later) for part in PARTS},
    }


def product_flops_per_s(dtype: torch.dtype) -> float:
    """Speed of a plain [2048, 1024] x [1024, 4096] product, the limit of what the step could reach."""
    left, right = torch.randn(2048, 1024).to(dtype), torch.randn(1024, 4096).to(dtype)
    seconds = []
    for _ in range(8):
        begun = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - begun)
    return 2 * 2048 * 1024 * 4096 / statistics.median(seconds)


def main() -> None:
    """Measure every variant and print the record."""
    args = arguments()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    payload = scored_payload(args)
    results = {variant: figures(train(args, variant, payload)) for variant in VARIANTS}
    # Forward and backward of all but the embedding: 6 FLOPs a parameter and token.
    from transformers import AutoConfig, AutoModelForCausalLM

    make: Any = AutoModelForCausalLM.from_config
    model = make(AutoConfig.from_pretrained(args.model))
    parameters = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    limit = product_flops_per_s(getattr(torch, args.dtype)) / (6 * parameters)
    base = results["lsm"]["model_tokens_per_s"]["median"]
    record = {
        "benchmark": "learner",
        "machine": machine() | {"torch_threads": torch.get_num_threads()},
        "model": Path(args.model).name,
        "settings": {name: getattr(args, name) for name in ("trajectories", "top_k", "dtype", "tokens_per_microbatch")},
        "variants": results,
        "limit": {
            "model_tokens_per_s": limit,
            "meaning": "6 FLOPs a parameter (embedding and head aside) and token at the speed of a plain product",
            "share_reached_by_lsm": base / limit,
        },
        "checks": [],
    }
    line = json.dumps(record)
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
