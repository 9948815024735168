"""The objectives in one launch each: per-sequence sums to loss, slopes and everything that is reported.

One program walks the sequences in blocks, in a fixed order, so that results repeat to the bit. ``loss`` is a tensor of
its own, because a caller may change it in place; ``scalars`` receives float32: NLL (BCO: δ), mean logits of the chosen
and of the rejected sequences.
"""

# A launch gives values for constexpr arguments, and device code is not Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportInvalidTypeForm=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_pref.kernels import configs
from fused_pref.kernels.losses import alpha_reward, log_logistic, logistic, pair_loss, saturate


@triton.jit
def _count(value, pointer):
    """A normalizer, as a number or in memory; infinity for 0, so that a finite total over it is 0."""
    if pointer is not None:
        value = tl.load(pointer).to(tl.float64)
    else:
        value = tl.cast(value, tl.float64)
    return tl.where(value > 0, value, float("inf"))


@triton.jit
def _total(values):
    return tl.sum(values, 0)


@triton.jit
def _pair_objective_kernel(
    sums,  # [S] float64
    counts,  # [S] int64
    totals, positions,  # [S] float64, int64, or None
    ref_logps,  # [S] or None
    pair_normalizer, token_normalizer,  # 0-d or None
    loss,  # 0-d
    scalars,  # [3]
    logps, rewards,  # [S]
    slope,  # [S] float64
    pairs, pair_count: tl.float64, token_count: tl.float64,
    beta: tl.float64, smoothing: tl.float64, cpo_alpha: tl.float64, gamma: tl.float64, alpha: tl.float64,
    LOSS: tl.constexpr, AVERAGE: tl.constexpr, ALPHA: tl.constexpr, NLL: tl.constexpr, TOKEN_COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pair_number = _count(pair_count, pair_normalizer)
    nll_number = pair_number
    if NLL == "token":
        if TOKEN_COUNT:
            tokens = tl.zeros([BLOCK], tl.int64)
            for start in range(0, pairs, BLOCK):
                w = start + tl.arange(0, BLOCK)
                tokens += tl.load(counts + w, mask=w < pairs, other=0)
            found = _total(tokens).to(tl.float64)
            nll_number = tl.where(found > 0, found, float("inf"))
        else:
            nll_number = _count(token_count, token_normalizer)
    summed = tl.zeros([BLOCK], tl.float64)
    chosen = tl.zeros([BLOCK], tl.float64)
    w_total = tl.zeros([BLOCK], tl.float64)
    l_total = tl.zeros([BLOCK], tl.float64)
    w_places = tl.zeros([BLOCK], tl.int64)
    l_places = tl.zeros([BLOCK], tl.int64)
    for start in range(0, pairs, BLOCK):
        w = start + tl.arange(0, BLOCK)
        l = w + pairs
        inside = w < pairs
        w_sum = tl.load(sums + w, mask=inside, other=0.0)
        l_sum = tl.load(sums + l, mask=inside, other=0.0)
        if AVERAGE:
            w_length = tl.maximum(tl.load(counts + w, mask=inside, other=1), 1).to(tl.float64)
            l_length = tl.maximum(tl.load(counts + l, mask=inside, other=1), 1).to(tl.float64)
        else:
            w_length = tl.zeros([BLOCK], tl.float64) + 1.0
            l_length = w_length
        w_logps = w_sum / w_length
        l_logps = l_sum / l_length
        if ref_logps is not None:
            w_reward = w_sum - tl.load(ref_logps + w, mask=inside, other=0.0).to(tl.float64)
            l_reward = l_sum - tl.load(ref_logps + l, mask=inside, other=0.0).to(tl.float64)
            w_enters = w_reward / w_length
            l_enters = l_reward / l_length
            w_grown = tl.zeros([BLOCK], tl.float64) + 1.0
            l_grown = w_grown
        else:
            w_enters, w_grown = alpha_reward(w_logps, alpha, ALPHA)
            l_enters, l_grown = alpha_reward(l_logps, alpha, ALPHA)
            w_reward = w_enters
            l_reward = l_enters
        losses, rises = pair_loss(w_enters - l_enters, beta, smoothing, gamma, LOSS)
        summed += tl.where(inside, losses, 0.0)
        w_slope = rises * w_grown / w_length / pair_number
        l_slope = -rises * l_grown / l_length / pair_number
        if NLL is not None:
            chosen += w_sum
            w_slope -= cpo_alpha / nll_number
        tl.store(logps + w, saturate(w_logps).to(tl.float32), mask=inside)
        tl.store(logps + l, saturate(l_logps).to(tl.float32), mask=inside)
        tl.store(rewards + w, saturate(beta * w_reward).to(tl.float32), mask=inside)
        tl.store(rewards + l, saturate(beta * l_reward).to(tl.float32), mask=inside)
        tl.store(slope + w, saturate(w_slope), mask=inside)
        tl.store(slope + l, saturate(l_slope), mask=inside)
        if totals is not None:
            w_total += tl.load(totals + w, mask=inside, other=0.0)
            l_total += tl.load(totals + l, mask=inside, other=0.0)
            w_places += tl.load(positions + w, mask=inside, other=0)
            l_places += tl.load(positions + l, mask=inside, other=0)
    result = _total(summed) / pair_number
    if NLL is not None:
        nll = -_total(chosen) / nll_number
        result += cpo_alpha * nll
    else:
        nll = tl.zeros_like(result)
    tl.store(loss, saturate(result).to(tl.float32))
    tl.store(scalars, saturate(nll).to(tl.float32))
    if totals is not None:
        w_mean = _total(w_total) / tl.maximum(_total(w_places), 1).to(tl.float64)
        l_mean = _total(l_total) / tl.maximum(_total(l_places), 1).to(tl.float64)
        tl.store(scalars + 1, saturate(w_mean).to(tl.float32))
        tl.store(scalars + 2, saturate(l_mean).to(tl.float32))


@triton.jit
def _folded(mean, count, added, number, decay, KIND: tl.constexpr):
    """A class's mean and count with a batch's sum and number folded in; unchanged where the number is 0."""
    risen = count + number
    fresh = added / tl.maximum(number, 1).to(tl.float64)
    if KIND == "running_mean":
        moved = mean + (fresh - mean) * (number.to(tl.float64) / tl.maximum(risen, 1).to(tl.float64))
    else:
        moved = tl.where(count > 0, decay * mean + (1.0 - decay) * fresh, fresh)
    return tl.where(number > 0, moved, mean), risen


@triton.jit
def _bco_objective_kernel(
    sums,  # [S] float64
    totals, positions,  # [S] float64, int64, or None
    desirable,  # [S] bool
    ref_logps,  # [S]
    sample_weight,  # [S] or None
    delta,  # 0-d or None
    shift_mean, shift_count, pending_sum, pending_count,  # [2] or None: state of a RewardShift, updated in place
    sequence_normalizer, positive_normalizer, negative_normalizer,  # 0-d or None
    loss,  # 0-d
    scalars,  # [3]
    numbers,  # [2] int64
    rewards, logps,  # [S]
    slope,  # [S] float64
    sequences, delta_value: tl.float64, sequence_count: tl.float64, positive_count: tl.float64,
    negative_count: tl.float64, beta: tl.float64, decay: tl.float64,
    CLASS_MEAN: tl.constexpr, CLASS_COUNT: tl.constexpr, KIND: tl.constexpr, UPDATE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    w_sum = tl.zeros([BLOCK], tl.float64)
    l_sum = tl.zeros([BLOCK], tl.float64)
    w_finite = tl.zeros([BLOCK], tl.int64)
    l_finite = tl.zeros([BLOCK], tl.int64)
    w_number = tl.zeros([BLOCK], tl.int64)
    l_number = tl.zeros([BLOCK], tl.int64)
    for start in range(0, sequences, BLOCK):
        s = start + tl.arange(0, BLOCK)
        inside = s < sequences
        w = tl.load(desirable + s, mask=inside, other=0).to(tl.int1) & inside
        l = inside & (w == 0)
        total = tl.load(sums + s, mask=inside, other=0.0)
        reward = beta * (total - tl.load(ref_logps + s, mask=inside, other=0.0).to(tl.float64))
        tl.store(rewards + s, saturate(reward).to(tl.float32), mask=inside)
        tl.store(logps + s, saturate(total).to(tl.float32), mask=inside)
        finite = tl.abs(reward) < float("inf")
        w_sum += tl.where(w & finite, reward, 0.0)
        l_sum += tl.where(l & finite, reward, 0.0)
        w_finite += (w & finite).to(tl.int64)
        l_finite += (l & finite).to(tl.int64)
        w_number += w.to(tl.int64)
        l_number += l.to(tl.int64)
    positives = _total(w_number)
    negatives = _total(l_number)
    tl.store(numbers, positives)
    tl.store(numbers + 1, negatives)

    if KIND == "fixed":
        if delta is not None:
            shift = tl.load(delta).to(tl.float64)
        else:
            shift = tl.cast(delta_value, tl.float64)
    else:
        w_mean = tl.load(shift_mean)
        l_mean = tl.load(shift_mean + 1)
        w_seen = tl.load(shift_count)
        l_seen = tl.load(shift_count + 1)
        added = _total(w_sum)
        number = _total(w_finite)
        l_added = _total(l_sum)
        l_new = _total(l_finite)
        # Every thread has read the state before one of them writes it.
        tl.debug_barrier()
        if UPDATE == "step":
            tl.store(pending_sum, tl.load(pending_sum) + added)
            tl.store(pending_sum + 1, tl.load(pending_sum + 1) + l_added)
            tl.store(pending_count, tl.load(pending_count) + number)
            tl.store(pending_count + 1, tl.load(pending_count + 1) + l_new)
        if UPDATE == "forward":
            if KIND == "running_mean":
                added += l_added
                number += l_new
            else:
                l_mean, l_seen = _folded(l_mean, l_seen, l_added, l_new, decay, KIND)
                tl.store(shift_mean + 1, l_mean)
                tl.store(shift_count + 1, l_seen)
            w_mean, w_seen = _folded(w_mean, w_seen, added, number, decay, KIND)
            tl.store(shift_mean, w_mean)
            tl.store(shift_count, w_seen)
        if KIND == "running_mean":
            shift = w_mean
        else:
            w_exists = tl.where(w_seen > 0, 1.0, 0.0).to(tl.float64)
            l_exists = tl.where(l_seen > 0, 1.0, 0.0).to(tl.float64)
            shift = (w_mean * w_exists + l_mean * l_exists) / tl.maximum(w_exists + l_exists, 1.0)

    if CLASS_MEAN:
        if CLASS_COUNT:
            w_count = tl.maximum(positives, 1).to(tl.float64)
            l_count = tl.maximum(negatives, 1).to(tl.float64)
        else:
            w_count = _count(positive_count, positive_normalizer)
            l_count = _count(negative_count, negative_normalizer)
    else:
        w_count = _count(sequence_count, sequence_normalizer)
        l_count = w_count
    summed = tl.zeros([BLOCK], tl.float64)
    w_total = tl.zeros([BLOCK], tl.float64)
    l_total = tl.zeros([BLOCK], tl.float64)
    w_places = tl.zeros([BLOCK], tl.int64)
    l_places = tl.zeros([BLOCK], tl.int64)
    for start in range(0, sequences, BLOCK):
        s = start + tl.arange(0, BLOCK)
        inside = s < sequences
        w = tl.load(desirable + s, mask=inside, other=0).to(tl.int1) & inside
        l = inside & (w == 0)
        total = tl.load(sums + s, mask=inside, other=0.0)
        reward = beta * (total - tl.load(ref_logps + s, mask=inside, other=0.0).to(tl.float64))
        sign = tl.where(w, 1.0, -1.0)
        x = sign * (reward - shift)
        weight = sign / tl.where(w, w_count, l_count)
        if sample_weight is not None:
            weight *= tl.load(sample_weight + s, mask=inside, other=0.0).to(tl.float64)
        summed += tl.where(inside, -log_logistic(x) * (sign * weight), 0.0)
        tl.store(slope + s, saturate(-beta * logistic(-x) * weight), mask=inside)
        if totals is not None:
            mean = tl.load(totals + s, mask=inside, other=0.0)
            place = tl.load(positions + s, mask=inside, other=0)
            w_total += tl.where(w, mean, 0.0)
            l_total += tl.where(l, mean, 0.0)
            w_places += tl.where(w, place, 0)
            l_places += tl.where(l, place, 0)
    tl.store(loss, saturate(_total(summed)).to(tl.float32))
    tl.store(scalars, saturate(shift).to(tl.float32))
    if totals is not None:
        w_logits = _total(w_total) / tl.maximum(_total(w_places), 1).to(tl.float64)
        l_logits = _total(l_total) / tl.maximum(_total(l_places), 1).to(tl.float64)
        tl.store(scalars + 1, saturate(w_logits).to(tl.float32))
        tl.store(scalars + 2, saturate(l_logits).to(tl.float32))


def number_and_pointer(value: float | Tensor | None, device: torch.device) -> tuple[float, Tensor | None]:
    """A number by value; a 0-d tensor by pointer where it is on the device, else by value."""
    if isinstance(value, Tensor):
        return (0.0, value) if value.device == device else (float(value), None)
    return float(value or 0.0), None


def pair_objective(
    sums: Tensor,
    counts: Tensor,
    totals: Tensor,
    positions: Tensor,
    ref_logps: Tensor | None,
    pair_normalizer: float | Tensor | None,
    token_normalizer: float | Tensor | None,
    logits_mean: str | None,
    loss_type: str,
    average: bool,
    beta: float,
    label_smoothing: float,
    cpo_alpha: float,
    simpo_gamma: float,
    alpha: float,
    nll_reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, scalars, logps, rewards and slope of :func:`fused_pref.objectives.pair_objective`. One launch."""
    sequences, device = sums.shape[0], sums.device
    loss = torch.empty((), dtype=torch.float32, device=device)
    scalars = torch.empty(3, dtype=torch.float32, device=device)
    logps = torch.empty(sequences, dtype=torch.float32, device=device)
    rewards, slope = torch.empty_like(logps), torch.empty_like(sums)
    given = sequences // 2 if pair_normalizer is None else pair_normalizer
    pair_count, pair_pointer = number_and_pointer(given, device)
    token_count, token_pointer = number_and_pointer(token_normalizer, device)
    means = logits_mean is not None
    _pair_objective_kernel[1,](
        sums, counts, totals if means else None, positions if means else None, ref_logps, pair_pointer, token_pointer,
        loss, scalars, logps, rewards, slope,
        pairs=sequences // 2, pair_count=pair_count, token_count=token_count, beta=beta, smoothing=label_smoothing,
        cpo_alpha=cpo_alpha, gamma=simpo_gamma, alpha=alpha,
        LOSS=loss_type, AVERAGE=average, ALPHA=alpha != 0, NLL=nll_reduction if cpo_alpha else None,
        TOKEN_COUNT=token_normalizer is None, BLOCK=configs.OBJECTIVE.block, **configs.OBJECTIVE.options,
    )  # fmt: skip
    return loss, scalars, logps, rewards, slope


def bco_objective(
    sums: Tensor,
    totals: Tensor,
    positions: Tensor,
    desirable: Tensor,
    ref_logps: Tensor,
    sample_weight: Tensor | None,
    delta: float | Tensor | None,
    state: tuple[Tensor | None, ...],
    sequence_normalizer: float | Tensor | None,
    class_normalizer: tuple[float | Tensor, float | Tensor] | None,
    logits_mean: str | None,
    reduction: str,
    beta: float,
    kind: str,
    update: str | None,
    decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, scalars, class counts, logps, rewards, slope of BCO; ``state`` of a RewardShift is updated. One launch."""
    sequences, device = sums.shape[0], sums.device
    loss = torch.empty((), dtype=torch.float32, device=device)
    scalars = torch.empty(3, dtype=torch.float32, device=device)
    numbers = torch.empty(2, dtype=torch.int64, device=device)
    logps = torch.empty(sequences, dtype=torch.float32, device=device)
    rewards, slope = torch.empty_like(logps), torch.empty_like(sums)
    given = sequences if sequence_normalizer is None else sequence_normalizer
    sequence_count, sequence_pointer = number_and_pointer(given, device)
    positives, negatives = class_normalizer or (None, None)
    positive_count, positive_pointer = number_and_pointer(positives, device)
    negative_count, negative_pointer = number_and_pointer(negatives, device)
    delta_value, delta_pointer = number_and_pointer(delta, device)
    means = logits_mean is not None
    _bco_objective_kernel[1,](
        sums, totals if means else None, positions if means else None, desirable, ref_logps, sample_weight,
        delta_pointer, *state, sequence_pointer, positive_pointer, negative_pointer,
        loss, scalars, numbers, rewards, logps, slope,
        sequences=sequences, delta_value=delta_value, sequence_count=sequence_count, positive_count=positive_count,
        negative_count=negative_count, beta=beta, decay=decay,
        CLASS_MEAN=reduction == "class_mean", CLASS_COUNT=class_normalizer is None, KIND=kind,
        UPDATE=update, BLOCK=configs.OBJECTIVE.block, **configs.OBJECTIVE.options,
    )  # fmt: skip
    return loss, scalars, numbers, logps, rewards, slope
