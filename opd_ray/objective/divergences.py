"""Divergences between student and teacher on the K tokens of a support.

p is the student, q the teacher; p' and q' are p and q divided by their mass on the support. All quantities are
in nats and only the student carries gradient. What the losses here have in common:

- Teacher entries of -inf leave the support; a support without any finite entry gives loss 0 and gradient 0.
- Duplicate ids count as separate entries.
- Where a position holds a NaN or +inf, the loss is NaN and its gradient 0: the reduction drops it if it is
  masked, and lets it be seen if it is not.
- KL(a||b) is taken as the sum of a (log a - log b) - a + b, whose terms cannot be negative, so that rounding
  does not push a small loss below 0. It equals the usual sum where a and b have equal mass.
- Results are float32 (float64 if an input is float64). `lsm_loss` computes in that precision; the others
  compute in float64 and round, which keeps the digits of nearly equal distributions and of a small tail.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ray.config.choices import Direction
from opd_ray.objective.inputs import compute_dtype, require_name, require_same_shape

# The support's log-mass is kept at or below this, so that the tail has a logarithm.
MAX_LOG_MASS = -1e-7
# exp() of a log-prob above this overflows float64: no log-prob, but padding may hold anything.
MAX_LOGPROB = 700.0


def lsm_loss(student_topk_logits: Tensor, teacher_topk_logprobs: Tensor) -> Tensor:
    """Local support matching: reverse KL of student to teacher, both renormalised on the teacher's top-K.

    Source: arXiv 2603.25562, equations 6-8: sum over the support of p' (log p' - log q'). Its gradient is
    p'_v ((log p'_v - log q'_v) - loss) for logit v, nothing outside the support. With K = V it is the full
    reverse KL.

    Args:
        student_topk_logits: `[...,K]`, the student's logits (or log-probs) at the support's ids; K >= 2.
        teacher_topk_logprobs: `[...,K]`, the teacher's log-probs (or logits) at the same ids.

    Returns:
        Loss per position `[...]` in nats, float32 (float64 if an input is float64).

    Raises:
        ValueError: shapes differ, or K < 2 (one renormalised entry is always 1: no loss, no gradient).
    """
    dtype = compute_dtype(student_topk_logits, teacher_topk_logprobs)
    student, teacher, usable, support = _entries(student_topk_logits, teacher_topk_logprobs, dtype, 2, math.inf)
    log_p, log_q = _log_softmax_on(support, student), _log_softmax_on(support, teacher)
    loss = _kl_terms(support, log_p, log_q).sum(dim=-1)
    return torch.where(usable, loss, math.nan)


def forward_kl_topk(student_topk_logprobs: Tensor, teacher_topk_logprobs: Tensor, *, renormalize: bool) -> Tensor:
    """Forward KL of the teacher to the student over the teacher's top-K.

    ``renormalize=False``: sum over the support of q (log q - log p), with the probabilities of the whole
    vocabulary. It is one part of a longer sum, so it may be negative, and it is not clamped; its gradient is -q
    for each log-prob. ``renormalize=True``: the same of q' and p', never negative; its gradient is p' - q' for
    each log-prob or logit. With K = V both are the full forward KL. Where the student gives 0 to an entry of
    the support, the loss is inf.

    Source: the forward KL of arXiv 2306.13649 (GKD), on a top-K list.

    Args:
        student_topk_logprobs: `[...,K]`, the student's log-probs at the support's ids (logits will do if
            renormalised).
        teacher_topk_logprobs: `[...,K]`, the teacher's log-probs at the same ids.
        renormalize: whether both sides are divided by their mass on the support.

    Returns:
        Loss per position `[...]` in nats, float32 (float64 if an input is float64).

    Raises:
        ValueError: shapes differ, K < 1, or K < 2 when renormalised (one entry is then always 1).
    """
    pair = student_topk_logprobs, teacher_topk_logprobs
    smallest, bound = (2, math.inf) if renormalize else (1, MAX_LOGPROB)
    student, teacher, usable, support = _entries(*pair, torch.float64, smallest, bound)
    if renormalize:
        terms = _kl_terms(support, _log_softmax_on(support, teacher), _log_softmax_on(support, student))
    else:
        q = torch.where(support, teacher, -math.inf).exp()
        terms = q * torch.where(support & (q > 0), teacher - student, 0.0)
    return torch.where(usable, terms.sum(dim=-1), math.nan).to(compute_dtype(*pair))


def tail_kl(student_topk_logprobs: Tensor, teacher_topk_logprobs: Tensor, *, direction: Direction | str) -> Tensor:
    """KL over K + 1 bins: the support's entries, and one tail with all the rest of the vocabulary.

    The tail's log-prob is log(1 - exp(L)), where L is the log-mass of the support, clamped to at most -1e-7.
    Entries that leave the support (teacher -inf) leave it on both sides: the student's mass there joins its
    tail. With K = V the tails are equal and it is the full KL. A forward loss is inf where the
    student gives 0 to an entry of the support. Past the clamp a tail is constant and has no gradient, and the
    bins add up to 1 + 1e-7, so that the loss is up to 1e-7 off the plain sum; it is never negative.

    Source: the tail option of TRL's distillation losses (arXiv 2601.19897, 2606.22600).

    Args:
        student_topk_logprobs: `[...,K]`, the student's log-probs at the support's ids, over the whole
            vocabulary; K >= 1.
        teacher_topk_logprobs: `[...,K]`, the teacher's log-probs at the same ids, the same way.
        direction: `forward` = KL(q||p), `reverse` = KL(p||q).

    Returns:
        Loss per position `[...]` in nats, float32 (float64 if an input is float64).

    Raises:
        ValueError: shapes differ, K < 1, or an unknown direction.
    """
    require_name("direction", direction, Direction)
    pair = student_topk_logprobs, teacher_topk_logprobs
    student, teacher, usable, support = _entries(*pair, torch.float64, 1, MAX_LOGPROB)
    bins = torch.cat([support, usable.unsqueeze(-1)], dim=-1)
    log_p, log_q = _with_tail(support, student), _with_tail(support, teacher)
    terms = _kl_terms(bins, log_q, log_p) if direction == "forward" else _kl_terms(bins, log_p, log_q)
    return torch.where(usable, terms.sum(dim=-1), math.nan).to(compute_dtype(*pair))


def jsd_topk(student_topk_logits: Tensor, teacher_topk_logprobs: Tensor, *, beta: float) -> Tensor:
    """Jensen-Shannon divergence of student and teacher, both renormalised on the teacher's top-K.

    beta KL(q'||m) + (1 - beta) KL(p'||m) with m = beta q' + (1 - beta) p'. The ends are the pure divergences:
    beta = 0 gives the forward KL(q'||p'), beta = 1 the reverse KL(p'||q') (it is `lsm_loss`). They are not
    limits of the mixture form, which goes to 0 at both ends; it is bounded by ln 2 in between.

    Source: arXiv 2306.13649 (GKD), equation 1, with the ends as in TRL's `generalized_jsd_loss`.

    Args:
        student_topk_logits: `[...,K]`, the student's logits (or log-probs) at the support's ids; K >= 2.
        teacher_topk_logprobs: `[...,K]`, the teacher's log-probs (or logits) at the same ids.
        beta: weight of the teacher in the mixture, in [0, 1].

    Returns:
        Loss per position `[...]` in nats, never negative, float32 (float64 if an input is float64).

    Raises:
        ValueError: shapes differ, K < 2, or beta outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; use a number in [0, 1]")
    if beta == 0:
        return forward_kl_topk(student_topk_logits, teacher_topk_logprobs, renormalize=True)
    if beta == 1:
        return lsm_loss(student_topk_logits, teacher_topk_logprobs)
    pair = student_topk_logits, teacher_topk_logprobs
    student, teacher, usable, support = _entries(*pair, torch.float64, 2, math.inf)
    log_p = torch.where(support, _log_softmax_on(support, student), 0.0)
    log_q = torch.where(support, _log_softmax_on(support, teacher), 0.0)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    terms = beta * _kl_terms(support, log_q, log_m) + (1 - beta) * _kl_terms(support, log_p, log_m)
    return torch.where(usable, terms.sum(dim=-1), math.nan).to(compute_dtype(*pair))


def _entries(
    student: Tensor, teacher: Tensor, dtype: torch.dtype, smallest: int, bound: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return student and teacher in `dtype`, which positions are usable `[...]`, and their support `[...,K]`.

    Everything at a position that is not usable is out of the support. Values must be below `bound`.
    """
    require_same_shape(student=student, teacher=teacher)
    size = student.shape[-1] if student.dim() else 0
    if size < smallest:
        why = "a renormalised K = 1 teaches nothing" if smallest == 2 else "there is nothing to compare"
        raise ValueError(f"the support has K = {size} entries; use K >= {smallest}, because {why}")
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    usable = ((student < bound) & (teacher < bound)).all(dim=-1)  # false for NaN as well
    return student, teacher, usable, (teacher > -math.inf) & usable.unsqueeze(-1)


def _log_softmax_on(support: Tensor, logits: Tensor) -> Tensor:
    """Log-softmax over the entries in `support`, -inf elsewhere; a row without support is finite filler."""
    inside = torch.where(support, logits, -math.inf)
    return torch.where(support.any(dim=-1, keepdim=True), inside, 0.0).log_softmax(dim=-1)


def _with_tail(support: Tensor, logprobs: Tensor) -> Tensor:
    """Append the log-mass outside `support`; entries outside it are -inf."""
    inside = torch.where(support, logprobs, -math.inf)
    mass = inside.exp().sum(dim=-1, keepdim=True).clamp(max=math.exp(MAX_LOG_MASS))
    return torch.cat([inside, torch.log1p(-mass)], dim=-1)


def _kl_terms(inside: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return a (log a - log b) - a + b of each entry in `inside`, 0 elsewhere; the limit b where a is 0."""
    a = torch.where(inside, log_a, -math.inf).exp()
    b = torch.where(inside, log_b, -math.inf).exp()
    counts = inside & (a > 0)
    log_ratio = torch.where(counts, log_a - log_b, 0.0)
    near = counts & (log_ratio.abs() < 1)
    # Near equality the three parts cancel, so they are taken as a (exp(x) - 1 - x) with x = log b - log a.
    x = torch.where(near, -log_ratio, 0.0)
    return torch.where(near, a * (torch.expm1(x) - x), a * (log_ratio - 1) + b)
