"""Starts DeepSpeed for a learner rank.

Imports torch and deepspeed: learner workers only.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch

from opd_ray.config.choices import Dtype, Offload
from opd_ray.config.schema import LearnerConfig
from opd_ray.learner.policy_model import PolicyModel
from opd_ray.learner.schedule import lr_factor


def join_ranks() -> torch.device:
    """Meet the other ranks; the device that this rank trains on."""
    use_gpu = torch.cuda.is_available()
    if not use_gpu:
        # DeepSpeed would compile a shared-memory op for inference on CPUs, which takes a compiler and a minute.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo", verbose=False)
    return torch.device("cuda" if use_gpu else "cpu")


def deepspeed_config(cfg: LearnerConfig, num_ranks: int) -> dict[str, Any]:
    """DeepSpeed's config; microbatches are counted by hand (their number differs from step to step)."""
    return {
        "train_batch_size": num_ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": cfg.lr,
                "betas": [0.9, cfg.beta2],
                "weight_decay": cfg.weight_decay,
                # torch's own AdamW needs no compiler on the machine; fused, it passes over the memory once.
                "torch_adam": True,
                "fused": True,
            },
        },
        "zero_optimization": {"stage": cfg.zero_stage, **_offload(cfg.offload)},
        # DeepSpeed's own AdamW for host memory is a compiled op; torch's is used there too.
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": cfg.grad_clip,
        "bf16": {"enabled": cfg.dtype is Dtype.bfloat16},
        # Accumulation in the gradients' own dtype keeps stage 1 on the optimizer that has a loss scale.
        "data_types": {"grad_accum_dtype": "bf16" if cfg.dtype is Dtype.bfloat16 else "fp32"},
        "steps_per_print": 2**31,
    }


def _offload(offload: Offload) -> dict[str, Any]:
    place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    parts = {Offload.none: (), Offload.optimizer: ("optimizer",), Offload.parameters: ("optimizer", "param")}
    return {f"offload_{part}": place for part in parts[offload]}


def start_engine(policy: PolicyModel, cfg: LearnerConfig, *, num_ranks: int, num_steps: int) -> Any:
    """DeepSpeed's engine around the policy, in training mode; `num_steps` is the length of the schedule."""
    if cfg.zero_stage == 3:
        # The head's weight is used in the wrapper's forward pass, outside the module that owns it.
        deepspeed.zero.register_external_parameter(policy, policy.head_weight)

    def schedule(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: lr_factor(step, schedule=cfg.lr_schedule, warmup_steps=cfg.warmup_steps, num_steps=num_steps),
        )

    engine, *_ = deepspeed.initialize(
        model=policy,
        model_parameters=[p for p in policy.parameters() if p.requires_grad],
        config=deepspeed_config(cfg, num_ranks),
        lr_scheduler=schedule,
    )
    engine.train()
    return engine
