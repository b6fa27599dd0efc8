"""Teacher scoring against vLLM's prompt log-probs: scored tokens/s, and bytes a token on the wire.

``python -m benchmarks.bench_teacher --data FILE.jsonl [--model FOLDER] [--out benchmarks/results/teacher.json]``

FILE.jsonl has the texts `problem` and `solution` in each line; they become prompts and responses. Three scorers with
the same weights, dtype and threads do the same work: from an Arrow rollout batch to an Arrow scored batch, with
log-probs at the teacher's K most probable ids and at the sampled token for every response token. `opd_ray` is the
teacher worker; `vllm_dict` and `vllm_flat` read the same figures from `prompt_logprobs` of a vLLM engine, in its two
forms. Each scorer has a process of its own; in every round each scores the whole batch once, while the others wait.
vLLM has no way to leave the prompt's positions out: it computes their log-probs too, and they are not counted.

The last line printed is the record as JSON. Exit code 1 when a check fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.machine import check, finish, machine, spread
from benchmarks.teacher_scorers import Work, make_scorer
from opd_ray.cluster.worker_group import MALLOC_ENV
from opd_ray.config.choices import Dtype, Template
from opd_ray.trajectory.codec import decode, encode_rollouts
from opd_ray.trajectory.columns import row_views
from opd_ray.trajectory.rows import RolloutRow, scored_rows
from opd_ray.trajectory.schema import BatchSpec
from opd_ray.types import Prompt

SCORERS = ("opd_ray", "vllm_dict", "vllm_flat")


@dataclass(frozen=True, slots=True)
class Round:
    """One pass over the batch: wall and CPU seconds."""

    wall_s: float
    cpu_s: float


def child(pipe: Connection, scorer: str, work: Work, compiled: bool) -> None:
    """Serve rounds over `pipe`: a true value asks for one, anything else for the last results and the end."""
    import torch

    torch.set_num_threads(work.threads)
    made = make_scorer(scorer, work, compiled)
    scored = made.score(work.payload)  # warm-up
    pipe.send("ready")
    while pipe.recv():
        wall, cpu = time.perf_counter(), time.process_time()
        scored = made.score(work.payload)
        pipe.send(Round(time.perf_counter() - wall, time.process_time() - cpu))
    pipe.send((scored.to_pybytes(), made.raw_bytes()))
    pipe.recv()


def make_work(args: argparse.Namespace, dtype: Dtype) -> tuple[Work, dict[str, Any]]:
    """The workload in the real tokenizer's tokens, and what to say of it."""
    from transformers import AutoConfig

    from opd_ray.models.tokenization import PromptTokenizer, load_tokenizer, tokenizer_fingerprint

    tokenizer: Any = load_tokenizer(args.model)
    encoder = PromptTokenizer(tokenizer, Template.completion, args.model)
    records = [json.loads(line) for line in args.data.read_text().split("\n") if line]
    order = np.random.default_rng(args.seed).permutation(len(records)).tolist()
    prompts: list[Prompt] = []
    rows: list[RolloutRow] = []
    for index in order:
        prompt = Prompt(id=str(records[index].get("id", index)), problem=records[index]["problem"])
        prompt_ids = encoder.encode(prompt)
        response = [*tokenizer(records[index]["solution"])["input_ids"], tokenizer.eos_token_id]
        fits = len(response) >= args.shortest and len(prompt_ids) + len(response) <= args.longest
        if fits and len(rows) < args.sequences:
            prompts.append(prompt)
            rows.append(rollout_row(len(rows), prompt.id, prompt_ids, response))
    fingerprint = tokenizer_fingerprint(tokenizer)
    payload = encode_rollouts(rows, BatchSpec(fingerprint)).to_pybytes()
    vocab_size = int(AutoConfig.from_pretrained(args.model).vocab_size)
    lengths = [len(row.prompt_token_ids) + len(row.response_token_ids) for row in rows]
    facts = {
        "model": Path(args.model).name,
        "text": args.data.name,
        "sequences": len(rows),
        "prompt_and_response_tokens": {"min": min(lengths), "mean": statistics.mean(lengths), "max": max(lengths)},
        "prompt_tokens": sum(len(row.prompt_token_ids) for row in rows),
        "scored_tokens": sum(len(row.response_token_ids) for row in rows),
        "top_k": args.top_k,
        "threads": args.threads,
    }
    work = Work(args.model, dtype, args.threads, args.top_k, vocab_size, fingerprint, payload, tuple(prompts))
    return work, facts


def rollout_row(trajectory_id: int, prompt_id: str, prompt: Sequence[int], response: Sequence[int]) -> RolloutRow:
    """A trajectory as an engine would have sampled it."""
    return RolloutRow(
        trajectory_id=trajectory_id,
        prompt_id=prompt_id,
        prompt_token_ids=np.array(prompt, dtype=np.int32),
        response_token_ids=np.array(response, dtype=np.int32),
        behavior_logprobs=np.zeros(len(response), dtype=np.float32),
        version_starts=np.array([0], dtype=np.int32),
        version_values=np.array([0], dtype=np.int64),
        finish_reason="stop",
        temperature=1.0,
        top_p=1.0,
    )


def measure(work: Work, repeats: int, compiled: bool) -> dict[str, Any]:
    """Rounds of every scorer, its last scored batch and the size of what it handed out."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for scorer in SCORERS:
        pipes[scorer], theirs = context.Pipe()
        processes.append(context.Process(target=child, args=(theirs, scorer, work, compiled)))
        processes[-1].start()
        theirs.close()
        # One after the other, so that none is timed while another one is loading.
        pipes[scorer].recv()
    rounds: dict[str, list[Round]] = {scorer: [] for scorer in SCORERS}
    for repeat in range(repeats):
        # Another one begins each time.
        for scorer in SCORERS[repeat % 3 :] + SCORERS[: repeat % 3]:
            pipes[scorer].send(True)
            rounds[scorer].append(pipes[scorer].recv())
    found: dict[str, Any] = {}
    for scorer, pipe in pipes.items():
        pipe.send(False)
        scored, raw_bytes = pipe.recv()
        pipe.send(None)
        found[scorer] = (rounds[scorer], decode(scored), len(scored), raw_bytes)
    for process in processes:
        process.join()
    return found


def wire(batch: pa.RecordBatch, num_bytes: int) -> dict[str, float]:
    """Where the bytes of a scored batch are, for each response token (prompt ids are 4 bytes a prompt token).

    ``rest`` is what a row and a batch cost: version segments, offsets, prompt id, schema, Arrow's framing.
    """
    num_tokens = sum(len(row) for row in row_views(batch, "response_token_ids"))
    parts = {
        "support": ("teacher_topk_ids", "teacher_topk_logprobs"),
        "token": ("response_token_ids", "behavior_logprobs", "teacher_logprobs"),
        "prompt_ids": ("prompt_token_ids",),
    }
    found = {part: sum(batch.column(name).nbytes for name in names) for part, names in parts.items()}
    rest = num_bytes - sum(found.values())
    return {name: size / num_tokens for name, size in {**found, "rest": rest, "all": num_bytes}.items()}


def agreement(ours: pa.RecordBatch, theirs: pa.RecordBatch) -> dict[str, float]:
    """How near two scored batches are: sampled log-probs, and ids in both supports."""
    pairs = list(zip(scored_rows(ours), scored_rows(theirs), strict=True))
    supports = [ids for x, y in pairs for ids in zip(x.teacher_topk_ids, y.teacher_topk_ids, strict=True)]
    same = [len(np.intersect1d(*ids)) for ids in supports]
    return {
        "teacher_logprobs_max_difference": max(
            float(np.abs(x.teacher_logprobs - y.teacher_logprobs).max()) for x, y in pairs
        ),
        "share_of_ids_in_both": sum(same) / sum(x.teacher_topk_ids.size for x, _ in pairs),
    }


def report(found: dict[str, Any], dtype: Dtype, top_k: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of one dtype, and its checks."""
    ours = found["opd_ray"][1]
    num_tokens = sum(len(row) for row in row_views(ours, "response_token_ids"))
    figures: dict[str, Any] = {}
    for scorer, (rounds, batch, num_bytes, raw_bytes) in found.items():
        figures[scorer] = {
            "scored_tokens_per_s": spread([num_tokens / item.wall_s for item in rounds]),
            "scored_tokens_per_cpu_s": spread([num_tokens / item.cpu_s for item in rounds]),
            "rounds": [asdict(item) for item in rounds],
        }
        if raw_bytes is None:
            figures[scorer]["wire_bytes_per_token"] = wire(batch, num_bytes)
        else:
            figures[scorer]["pickled_bytes_per_token"] = raw_bytes / num_tokens
            figures[scorer]["agreement"] = agreement(ours, batch)
    ratios: dict[str, float] = {}
    for time_of in ("wall_s", "cpu_s"):
        for name, pick in (("median", statistics.median), ("fastest", min)):
            times = {scorer: pick([getattr(item, time_of) for item in found[scorer][0]]) for scorer in SCORERS}
            ratios[f"{time_of}/{name}"] = min(times["vllm_dict"], times["vllm_flat"]) / times["opd_ray"]
    figures["ratio_to_faster_vllm"] = ratios
    size = figures["opd_ray"]["wire_bytes_per_token"]["all"]
    checks = [
        check(f"{dtype.name}/ratio_to_faster_vllm", ratios["wall_s/median"], ">= 1.0"),
        check(f"{dtype.name}/wire_bytes_per_token", size, f"<= {6 * top_k + 16}"),
    ]
    if dtype is Dtype.float32:
        worst = max(
            figures[scorer]["agreement"]["teacher_logprobs_max_difference"] for scorer in SCORERS if scorer != "opd_ray"
        )
        checks.append(check("float32/logprob_difference_to_vllm", worst, "<= 1e-3"))
    return figures, checks


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="folder, see launch/smollm2.sh")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with the texts `problem` and `solution`")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=[item.name for item in Dtype])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--shortest", type=int, default=100, help="tokens of the response")
    parser.add_argument("--longest", type=int, default=400, help="tokens of prompt and response")
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="let vLLM compile its model")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    threads = str(args.threads)
    os.environ |= {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # The teacher group's workers have this; it helps all three.
        **MALLOC_ENV,
    }
    if not args.compile:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    record: dict[str, Any] = {"benchmark": "teacher", "machine": machine(), "workload": {}, "figures": {}, "checks": []}
    for name in args.dtype:
        work, record["workload"] = make_work(args, Dtype[name])
        figures, checks = report(measure(work, args.repeats, args.compile), work.dtype, work.top_k)
        record["figures"][name] = figures
        record["checks"] += checks
    record["workload"]["vllm_compiled"] = args.compile
    return finish(record, args.out)


if __name__ == "__main__":
    sys.exit(main())
