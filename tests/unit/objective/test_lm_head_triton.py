"""The Triton kernels, run by Triton's interpreter on the CPU in a process that has Triton, against the torch path."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from opd_ray.objective import support_logits, token_logprobs
from tests.unit.isolated import run_isolated

INTERPRETED = """
import torch
from opd_ray.objective import support_logits

generator = torch.Generator().manual_seed(0)
for n, v, h, k in ((2, 700, 150, 5), (1, 4000, 7, 40), (0, 300, 7, 3)):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-5)):
        hidden = torch.randn(n, h, generator=generator).to(dtype).requires_grad_()
        head = torch.randn(h, v, generator=generator).to(dtype).T.requires_grad_()
        ids = torch.randint(v, (n, k), generator=generator)
        ids[:, -1] = v - 1
        scale = torch.randn(n, k, generator=generator)
        results = []
        for kernel in ("triton", "torch"):
            logits = support_logits(hidden, head, ids, kernel=kernel)
            results.append((logits, *torch.autograd.grad((logits * scale).sum(), (hidden, head))))
        for got, wanted in zip(*results):
            assert got.dtype == wanted.dtype and got.shape == wanted.shape
            rounding = 2**-7 if wanted.dtype == torch.bfloat16 else tolerance
            torch.testing.assert_close(got, wanted, rtol=rounding, atol=tolerance)
print("agreed")
"""

COMPILED = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from opd_ray import objective
from opd_ray.objective import lm_head_triton

names = {
    lm_head_triton._logits_kernel: ("hidden", "head", "ids", "logits"),
    lm_head_triton._gradient_kernel: ("grad", "head", "ids", "result"),
}
for kernel, (first, head, ids, out) in names.items():
    logits = out == "logits"
    signature = {first: "*bf16" if logits else "*fp32", head: "*bf16", ids: "*i64", out: "*fp32" if logits else "*bf16"}
    signature |= {"size": "i32", "width": "i32", "SUM": "constexpr", "ENTRIES": "constexpr", "WIDTH": "constexpr"}
    constants = {"SUM": lm_head_triton._sum_dtype(torch.float32), "ENTRIES": 32, "WIDTH": 128}
    built = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert ".visible .entry" in built.asm["ptx"]
print("compiled")
try:
    objective.support_logits(torch.zeros(2, 4), torch.zeros(300, 4), torch.zeros(2, 3).long(), kernel="triton")
except ValueError as error:
    print(error)
"""


def test_the_kernels_agree_with_the_torch_path(tmp_path: Path) -> None:
    assert run_isolated(INTERPRETED, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="1") == "agreed"


def test_the_kernels_compile_for_a_gpu_that_is_not_here_and_refuse_tensors_on_the_cpu(tmp_path: Path) -> None:
    compiled, refusal = run_isolated(COMPILED, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert compiled == "compiled"
    assert refusal.endswith("use kernel 'torch' there")


def test_without_triton_the_error_names_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "opd_ray.objective.lm_head_triton", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="cannot be used .*; use kernel 'torch'"):
        support_logits(torch.zeros(2, 4), torch.zeros(300, 4), torch.zeros(2, 3, dtype=torch.long), kernel="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_bf16_on_a_gpu_against_float64(kernel: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 256, generator=generator).bfloat16()
    head = (torch.randn(20_000, 256, generator=generator) / 8).bfloat16()
    ids = torch.randint(20_000, (300, 32), generator=generator)
    found = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        h, w = (x.to(device, dtype).requires_grad_() for x in (hidden, head))
        at = ids.to(device)
        logits = support_logits(h, w, at, kernel=kernel if device == "cuda" else "torch")
        logprobs = token_logprobs(h, w, at[:, 0], chunk_size=128)
        grads = torch.autograd.grad(logits.square().mean() + logprobs.square().mean(), (h, w))
        found.append([x.detach().cpu().double() for x in (logits, logprobs, *grads)])
    for got, wanted, tolerance in zip(*found, (1e-5, 1e-5, 2**-7, 2**-7), strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))
