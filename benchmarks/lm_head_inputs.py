"""The tensors that `bench_lm_head.py` measures on, written once so that all its processes share their pages."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.lm_head_variants import BLOCK, SAMPLED
from opd_ray.objective import token_logprobs


def write_shared(folder: Path, length: int, top_k: int, vocab: int, ids: str) -> Path:
    """Draw what all cases share: support ids, teacher log-probs and the positions of a stratified sample.

    Zipf-like ids have probability 1 / (id + 10): frequent tokens have small ids, as in byte-pair vocabularies.
    """
    generator = torch.Generator().manual_seed(1)
    weights = torch.ones(vocab) if ids == "uniform" else 1 / (torch.arange(vocab) + 10.0)
    support = torch.stack([torch.multinomial(weights, top_k, generator=generator) for _ in range(length)])
    teacher = (2 * torch.randn(length, top_k, generator=generator)).sort(dim=1, descending=True).values
    stratum = BLOCK // SAMPLED
    within = torch.randint(stratum, (length // stratum,), generator=generator)
    path = folder / "shared.pt"
    torch.save(
        {
            "support_ids": support,
            "token_ids": support[:, 0].clone(),
            "teacher_logprobs": teacher.log_softmax(dim=1),
            "sampled_at": torch.arange(0, length, stratum) + within,
        },
        path,
    )
    return path


def write_model(folder: Path, shared: Path, hidden: int, vocab: int, dtype: str) -> tuple[Path, torch.Tensor]:
    """Draw hidden states, a head, and log-probs of a policy that has drifted; return the file and the drift.

    Drift is heavy-tailed: standard deviation 0.02 nats, for one token in twenty 0.2.
    """
    generator = torch.Generator().manual_seed(2)
    tokens = torch.load(shared)["token_ids"]
    states = torch.randn(len(tokens), hidden, generator=generator).to(getattr(torch, dtype))
    head = (torch.randn(vocab, hidden, generator=generator) * 2 / hidden**0.5).to(getattr(torch, dtype))
    rare = torch.rand(len(tokens), generator=generator) < 0.05
    drift = torch.randn(len(tokens), generator=generator) * torch.where(rare, 0.2, 0.02)
    with torch.no_grad():
        behavior = token_logprobs(states, head, tokens, chunk_size=1024) - drift
    path = folder / f"model-{hidden}-{dtype}.pt"
    torch.save({"hidden": states, "head": head, "behavior_logprobs": behavior}, path)
    return path, drift
