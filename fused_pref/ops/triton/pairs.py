"""CPO and DPO in one launch, whatever the mixture of losses: see :mod:`fused_pref.ops.triton.objective`."""

from dataclasses import astuple
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_pref.ops.interface import PairSpec
from fused_pref.ops.triton import configs
from fused_pref.ops.triton.launch import launch
from fused_pref.ops.triton.losses import pair_loss, saturate, transformed
from fused_pref.ops.triton.objective import divisor, number, store_mean, value_and_pointer, with_logits, zeros

# Fields of one of TERMS.
WEIGHT, SMOOTHING, AVERAGE, DIVERGENCE, SHIFT, PARTNERS = map(tl.constexpr, range(6))


@triton.jit
def _chosen_tokens(counts, pairs, BLOCK: tl.constexpr):
    """The number of scored tokens of the chosen sequences."""
    tokens = tl.zeros([BLOCK], tl.int64)
    for start in range(0, pairs, BLOCK):
        w = start + tl.arange(0, BLOCK)
        tokens += tl.load(counts + w, mask=w < pairs, other=0)
    return tl.sum(tokens, 0).to(tl.float64)


@triton.jit
def _half(
    s, inside, sums, counts, ref_logps, logps, rewards, beta, alpha, AVERAGED: tl.constexpr, TRANSFORM: tl.constexpr
):
    """Store log-prob and reward of one sequence of each pair; its sum, length and log-ratio, plain and transformed.

    Without a reference the log-ratio is the reported log-prob. The last is the derivative of the transformed one.
    """
    total = tl.load(sums + s, mask=inside, other=0.0)
    length = tl.maximum(tl.load(counts + s, mask=inside, other=1), 1).to(tl.float64)
    reported = total / length if AVERAGED else total
    ratio = reported
    if ref_logps is not None:
        ratio = total - tl.load(ref_logps + s, mask=inside, other=0.0).to(tl.float64)
    score, rise = transformed(ratio, alpha, TRANSFORM)
    if AVERAGED and ref_logps is None:
        rise = rise / length
    tl.store(logps + s, saturate(reported).to(tl.float32), mask=inside)
    reward = score if ref_logps is None else ratio
    tl.store(rewards + s, saturate(beta * reward).to(tl.float32), mask=inside)
    return total, length, ratio, score, rise


@triton.jit
def _enters(length, ratio, score, rise, offset, TERMS: tl.constexpr, T: tl.constexpr):
    """What enters a term, by its number, and its derivative in the log-ratio."""
    x = ratio
    growth = tl.zeros_like(ratio) + 1.0
    if TERMS[T][DIVERGENCE]:
        x = score
        growth = rise
    if TERMS[T][AVERAGE]:
        x = x / length
        growth = growth / length
    if TERMS[T][SHIFT]:
        x = x - offset
    return x, growth


@triton.jit
def _term(
    w, l, inside, w_x, l_x, partners, pairs, beta, gamma, tau,
    NAMES: tl.constexpr, TERMS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """A term's losses and slopes, from what enters it of the sequences ``w`` and ``l`` of each pair."""
    NAME: tl.constexpr = NAMES[T]
    smoothing = tl.full([], TERMS[T][SMOOTHING], tl.float64)
    w_other, l_other = l_x, w_x
    if TERMS[T][PARTNERS] >= 0:
        row = partners + TERMS[T][PARTNERS] * 2 * tl.cast(pairs, tl.int64)
        w_other = tl.load(row + w, mask=inside, other=0.0)
        l_other = tl.load(row + l, mask=inside, other=0.0)
    losses, w_part, _ = pair_loss(w_x, w_other, beta, smoothing, gamma, tau, NAME)
    _, _, l_part = pair_loss(l_other, l_x, beta, smoothing, gamma, tau, NAME)
    return losses, w_part, l_part


@triton.jit
def _pair_objective_kernel(
    sums,  # [S] float64
    counts,  # [S] int64
    totals, positions,  # [S] float64, int64, or None
    ref_logps,  # [S] or None
    partners,  # [matched terms, S] float64 or None
    pair_normalizer, token_normalizer, delta,  # 0-d or None
    loss, scalars,  # 0-d, [3]
    logps, rewards, slope,  # [S], the last float64
    pairs, pair_count: tl.float64, token_count: tl.float64, delta_value: tl.float64,
    beta: tl.float64, nll_weight: tl.float64, gamma: tl.float64, alpha: tl.float64, tau: tl.float64,
    NAMES: tl.constexpr, TERMS: tl.constexpr, AVERAGED: tl.constexpr, TRANSFORM: tl.constexpr, NLL: tl.constexpr,
    TOKEN_COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """NAMES of the terms, and TERMS their other fields, see :func:`constant_terms`.

    Device functions get all terms and a number: Triton 3.6 cannot pass a tuple taken from another tuple to a function.
    """
    pair_number = divisor(number(pair_count, pair_normalizer))
    nll_number = pair_number
    if NLL == "token":
        tokens = _chosen_tokens(counts, pairs, BLOCK) if TOKEN_COUNT else number(token_count, token_normalizer)
        nll_number = divisor(tokens)
    offset = number(delta_value, delta) / beta
    summed, chosen = zeros(tl.float64, BLOCK)
    w_total, l_total = zeros(tl.float64, BLOCK)
    w_positions, l_positions = zeros(tl.int64, BLOCK)
    for start in range(0, pairs, BLOCK):
        w = start + tl.arange(0, BLOCK)
        l = w + pairs
        inside = w < pairs
        w_sum, w_length, w_ratio, w_score, w_rise = _half(
            w, inside, sums, counts, ref_logps, logps, rewards, beta, alpha, AVERAGED, TRANSFORM
        )
        _, l_length, l_ratio, l_score, l_rise = _half(
            l, inside, sums, counts, ref_logps, logps, rewards, beta, alpha, AVERAGED, TRANSFORM
        )
        w_slope, l_slope = zeros(tl.float64, BLOCK)
        for t in tl.static_range(len(NAMES)):
            weight = tl.full([], TERMS[t][WEIGHT], tl.float64)
            w_x, w_growth = _enters(w_length, w_ratio, w_score, w_rise, offset, TERMS, t)
            l_x, l_growth = _enters(l_length, l_ratio, l_score, l_rise, offset, TERMS, t)
            losses, w_part, l_part = _term(w, l, inside, w_x, l_x, partners, pairs, beta, gamma, tau, NAMES, TERMS, t)
            summed += weight * tl.where(inside, losses, 0.0)
            w_slope += weight * w_part * w_growth
            l_slope += weight * l_part * l_growth
        w_slope = w_slope / pair_number
        if NLL is not None:
            chosen += w_sum
            w_slope -= nll_weight / nll_number
        tl.store(slope + w, saturate(w_slope), mask=inside)
        tl.store(slope + l, saturate(l_slope / pair_number), mask=inside)
        w_total, w_positions = with_logits(w_total, w_positions, w, inside, totals, positions)
        l_total, l_positions = with_logits(l_total, l_positions, l, inside, totals, positions)
    result = tl.sum(summed, 0) / pair_number
    nll = tl.zeros_like(result)
    if NLL is not None:
        nll = -tl.sum(chosen, 0) / nll_number
        result += nll_weight * nll
    tl.store(loss, saturate(result).to(tl.float32))
    tl.store(scalars, saturate(nll).to(tl.float32))
    if totals is not None:
        store_mean(scalars + 1, w_total, w_positions)
        store_mean(scalars + 2, l_total, l_positions)


def pair_objective(
    scores: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    ref_logps: Tensor | None,
    partners: Tensor | None,
    pair_normalizer: float | Tensor | None,
    token_normalizer: float | Tensor | None,
    delta: float | Tensor | None,
    spec: PairSpec,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, scalars (3,), logps, rewards (S,) float32, slope (S,) float64. One launch.

    ``scores`` are :class:`fused_pref.losses.scores.Scores`, ``partners`` (matched terms, S) float64 log-ratios, others
    as of :class:`fused_pref.losses.pair.PairObjective`.
    """
    sums, counts, totals, positions = scores
    sequences, device = sums.shape[0], sums.device
    loss = torch.empty((), dtype=torch.float32, device=device)
    scalars = torch.empty(3, dtype=torch.float32, device=device)
    logps = torch.empty(sequences, dtype=torch.float32, device=device)
    rewards, slope, pairs = torch.empty_like(logps), torch.empty_like(sums), sequences // 2
    pair_count, pair_pointer = value_and_pointer(pairs if pair_normalizer is None else pair_normalizer, device)
    token_count, token_pointer = value_and_pointer(token_normalizer, device)
    delta_value, delta_pointer = value_and_pointer(delta, device)
    transform = "js" if spec.jensen_shannon else "alpha" if spec.alpha else None
    launch(
        _pair_objective_kernel, (1,), device,
        sums, counts, totals, positions, ref_logps, partners, pair_pointer, token_pointer, delta_pointer,
        loss, scalars, logps, rewards, slope,
        pairs=pairs, pair_count=pair_count, token_count=token_count, delta_value=delta_value, beta=spec.beta,
        nll_weight=spec.nll_weight, gamma=spec.simpo_gamma, alpha=spec.alpha, tau=spec.tau,
        NAMES=tuple([term.name for term in spec.terms]), TERMS=constant_terms(spec), AVERAGED=spec.averaged,
        TRANSFORM=transform,
        NLL=spec.nll_reduction if spec.nll_weight else None, TOKEN_COUNT=token_normalizer is None,
        BLOCK=configs.OBJECTIVE.block, **configs.OBJECTIVE.options,
    )  # fmt: skip
    return loss, scalars, logps, rewards, slope


def constant_terms(spec: PairSpec) -> tuple[tuple[Any, ...], ...]:
    """The terms without their names, as the kernel takes them: for ``matched`` the row of ``partners``, −1 for none."""
    matched = [term for term in spec.terms if term.matched]
    rows = [matched.index(term) if term.matched else -1 for term in spec.terms]
    return tuple([(*astuple(term)[1:6], row) for term, row in zip(spec.terms, rows, strict=True)])
