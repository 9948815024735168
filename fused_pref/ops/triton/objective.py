"""The objectives in one launch each: per-sequence sums to loss, slopes and everything that is reported.

One program walks the sequences in blocks, in a fixed order, so that results repeat bitwise. ``loss`` is a tensor of
its own, because a caller may change it in place; ``scalars`` receives float32: NLL (of single sequences: the shift),
mean logits of the chosen and of the rejected sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_pref.ops.interface import AVERAGED, PairSpec, ShiftMemory, UnpairedSpec
from fused_pref.ops.triton import configs
from fused_pref.ops.triton.launch import launch
from fused_pref.ops.triton.losses import alpha_reward, pair_loss, saturate, unpaired_loss


@triton.jit
def _number(value, pointer):
    """A number (float64) that is given by value or in memory."""
    if pointer is not None:
        return tl.load(pointer).to(tl.float64)
    else:
        return tl.cast(value, tl.float64)


@triton.jit
def _divisor(number):
    """Infinity for a normalizer of 0, so that a finite total over it is 0."""
    return tl.where(number > 0, number, float("inf"))


@triton.jit
def _zeros(TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Sums under way: of the chosen or desirable sequences, and of the others."""
    return tl.zeros([BLOCK], TYPE), tl.zeros([BLOCK], TYPE)


@triton.jit
def _with_logits(total, positions_sum, s, members, totals, positions):
    """Σ z and the number of its positions, with those of the ``members`` of sequences ``s``."""
    if totals is not None:
        total += tl.load(totals + s, mask=members, other=0.0)
        positions_sum += tl.load(positions + s, mask=members, other=0)
    return total, positions_sum


@triton.jit
def _store_mean(out, total, positions_sum):
    """The mean logit from sums of z and of positions, 0 without a position."""
    mean = tl.sum(total, 0) / tl.maximum(tl.sum(positions_sum, 0), 1).to(tl.float64)
    tl.store(out, saturate(mean).to(tl.float32))


@triton.jit
def _chosen_tokens(counts, pairs, BLOCK: tl.constexpr):
    """The number of scored tokens of the chosen sequences."""
    tokens = tl.zeros([BLOCK], tl.int64)
    for start in range(0, pairs, BLOCK):
        w = start + tl.arange(0, BLOCK)
        tokens += tl.load(counts + w, mask=w < pairs, other=0)
    return tl.sum(tokens, 0).to(tl.float64)


@triton.jit
def _half(s, inside, sums, counts, ref_logps, logps, rewards, beta, alpha, AVERAGE: tl.constexpr, ALPHA: tl.constexpr):
    """Store log-prob and reward of one sequence of each pair; its sum, its length, what enters Δ and its growth."""
    total = tl.load(sums + s, mask=inside, other=0.0)
    if AVERAGE:
        length = tl.maximum(tl.load(counts + s, mask=inside, other=1), 1).to(tl.float64)
    else:
        length = tl.zeros_like(total) + 1.0
    if ref_logps is not None:
        reward = total - tl.load(ref_logps + s, mask=inside, other=0.0).to(tl.float64)
        enters = reward / length
        grown = tl.zeros_like(total) + 1.0
    else:
        enters, grown = alpha_reward(total / length, alpha, ALPHA)
        reward = enters
    tl.store(logps + s, saturate(total / length).to(tl.float32), mask=inside)
    tl.store(rewards + s, saturate(beta * reward).to(tl.float32), mask=inside)
    return total, length, enters, grown


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
    pair_number = _divisor(_number(pair_count, pair_normalizer))
    nll_number = pair_number
    if NLL == "token":
        tokens = _chosen_tokens(counts, pairs, BLOCK) if TOKEN_COUNT else _number(token_count, token_normalizer)
        nll_number = _divisor(tokens)
    summed, chosen = _zeros(tl.float64, BLOCK)
    w_total, l_total = _zeros(tl.float64, BLOCK)
    w_positions, l_positions = _zeros(tl.int64, BLOCK)
    for start in range(0, pairs, BLOCK):
        w = start + tl.arange(0, BLOCK)
        l = w + pairs
        inside = w < pairs
        w_sum, w_length, w_enters, w_grown = _half(
            w, inside, sums, counts, ref_logps, logps, rewards, beta, alpha, AVERAGE, ALPHA
        )
        _, l_length, l_enters, l_grown = _half(
            l, inside, sums, counts, ref_logps, logps, rewards, beta, alpha, AVERAGE, ALPHA
        )
        losses, rises = pair_loss(w_enters - l_enters, beta, smoothing, gamma, LOSS)
        summed += tl.where(inside, losses, 0.0)
        w_slope = rises * w_grown / w_length / pair_number
        l_slope = -rises * l_grown / l_length / pair_number
        if NLL is not None:
            chosen += w_sum
            w_slope -= cpo_alpha / nll_number
        tl.store(slope + w, saturate(w_slope), mask=inside)
        tl.store(slope + l, saturate(l_slope), mask=inside)
        w_total, w_positions = _with_logits(w_total, w_positions, w, inside, totals, positions)
        l_total, l_positions = _with_logits(l_total, l_positions, l, inside, totals, positions)
    result = tl.sum(summed, 0) / pair_number
    nll = tl.zeros_like(result)
    if NLL is not None:
        nll = -tl.sum(chosen, 0) / nll_number
        result += cpo_alpha * nll
    tl.store(loss, saturate(result).to(tl.float32))
    tl.store(scalars, saturate(nll).to(tl.float32))
    if totals is not None:
        _store_mean(scalars + 1, w_total, w_positions)
        _store_mean(scalars + 2, l_total, l_positions)


@triton.jit
def _classes(s, inside, sums, desirable, ref_logps, beta):
    """Of sequences ``s``: which are desirable and which are not, log-probs and rewards."""
    w = tl.load(desirable + s, mask=inside, other=0).to(tl.int1) & inside
    total = tl.load(sums + s, mask=inside, other=0.0)
    reward = beta * (total - tl.load(ref_logps + s, mask=inside, other=0.0).to(tl.float64))
    return w, inside & (w == 0), total, reward


@triton.jit
def _class_sums(sums, desirable, ref_logps, logps, rewards, sequences, beta, BLOCK: tl.constexpr):
    """Store log-probs and rewards; of each class the sum and number of the finite ones, and how many it has."""
    w_sum, l_sum = _zeros(tl.float64, BLOCK)
    w_finite, l_finite = _zeros(tl.int64, BLOCK)
    w_number, l_number = _zeros(tl.int64, BLOCK)
    for start in range(0, sequences, BLOCK):
        s = start + tl.arange(0, BLOCK)
        inside = s < sequences
        w, l, total, reward = _classes(s, inside, sums, desirable, ref_logps, beta)
        tl.store(rewards + s, saturate(reward).to(tl.float32), mask=inside)
        tl.store(logps + s, saturate(total).to(tl.float32), mask=inside)
        finite = tl.abs(reward) < float("inf")
        w_sum += tl.where(w & finite, reward, 0.0)
        l_sum += tl.where(l & finite, reward, 0.0)
        w_finite += (w & finite).to(tl.int64)
        l_finite += (l & finite).to(tl.int64)
        w_number += w.to(tl.int64)
        l_number += l.to(tl.int64)
    return (
        tl.sum(w_sum, 0), tl.sum(l_sum, 0), tl.sum(w_finite, 0), tl.sum(l_finite, 0),
        tl.sum(w_number, 0), tl.sum(l_number, 0),
    )  # fmt: skip


@triton.jit
def _folded(mean, count, added, number, decay, KIND: tl.constexpr):
    """A class's mean and count with a batch's sum and number folded in; unchanged where the number is 0."""
    risen = count + number
    fresh = added / tl.maximum(number, 1).to(tl.float64)
    if KIND == "running_mean":
        moved = mean + (fresh - mean) * (number.to(tl.float64) / tl.maximum(risen, 1).to(tl.float64))
    else:
        tl.static_assert(KIND == "ema", "unknown kind of shift")
        moved = tl.where(count > 0, decay * mean + (1.0 - decay) * fresh, fresh)
    return tl.where(number > 0, moved, mean), risen


@triton.jit
def _moving_shift(
    shift_mean, shift_count, pending_sum, pending_count,  # [2]
    w_added, w_new, l_added, l_new, decay, KIND: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    """δ of a RewardShift after the update that this batch, of these sums and numbers, makes to its state."""
    # Volatile loads are waited for where they stand: every thread has read the state before one of them writes it.
    w_mean = tl.load(shift_mean, volatile=True)
    l_mean = tl.load(shift_mean + 1, volatile=True)
    w_seen = tl.load(shift_count, volatile=True)
    l_seen = tl.load(shift_count + 1, volatile=True)
    if UPDATE == "step":
        w_added += tl.load(pending_sum, volatile=True)
        l_added += tl.load(pending_sum + 1, volatile=True)
        w_new += tl.load(pending_count, volatile=True)
        l_new += tl.load(pending_count + 1, volatile=True)
        tl.debug_barrier()
        tl.store(pending_sum, w_added)
        tl.store(pending_sum + 1, l_added)
        tl.store(pending_count, w_new)
        tl.store(pending_count + 1, l_new)
    if UPDATE == "forward":
        if KIND == "running_mean":
            w_added += l_added
            w_new += l_new
        else:
            l_mean, l_seen = _folded(l_mean, l_seen, l_added, l_new, decay, KIND)
        w_mean, w_seen = _folded(w_mean, w_seen, w_added, w_new, decay, KIND)
        tl.debug_barrier()
        tl.store(shift_mean, w_mean)
        tl.store(shift_count, w_seen)
        if KIND != "running_mean":
            tl.store(shift_mean + 1, l_mean)
            tl.store(shift_count + 1, l_seen)
    if KIND == "running_mean":
        return w_mean
    else:
        w_exists = tl.where(w_seen > 0, 1.0, 0.0).to(tl.float64)
        l_exists = tl.where(l_seen > 0, 1.0, 0.0).to(tl.float64)
        return (w_mean * w_exists + l_mean * l_exists) / tl.maximum(w_exists + l_exists, 1.0)


@triton.jit
def _shift_of_rewards(given, beta, LOSS: tl.constexpr):
    """What is subtracted from the rewards: δ, or β·kl, or 0."""
    if LOSS == "kto":
        return beta * given
    elif LOSS == "bco":
        return given
    else:
        return tl.zeros_like(given)


@triton.jit
def _unpaired_objective_kernel(
    sums,  # [S] float64
    totals, positions,  # [S] float64, int64, or None
    desirable,  # [S] bool
    ref_logps,  # [S]
    sample_weight,  # [S] or None
    shift,  # 0-d or None: δ, or KTO's KL divergence
    shift_mean, shift_count, pending_sum, pending_count,  # [2] or None: state of a RewardShift, updated in place
    sequence_normalizer, positive_normalizer, negative_normalizer,  # 0-d or None
    loss,  # 0-d
    scalars,  # [3]
    numbers,  # [2] int64
    logps, rewards,  # [S]
    slope,  # [S] float64
    sequences, shift_value: tl.float64, sequence_count: tl.float64, positive_count: tl.float64,
    negative_count: tl.float64, beta: tl.float64, decay: tl.float64, desirable_weight: tl.float64,
    undesirable_weight: tl.float64,
    LOSS: tl.constexpr, CLASS_MEAN: tl.constexpr, CLASS_COUNT: tl.constexpr, KIND: tl.constexpr, UPDATE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    w_sum, l_sum, w_finite, l_finite, w_number, l_number = _class_sums(
        sums, desirable, ref_logps, logps, rewards, sequences, beta, BLOCK
    )
    tl.store(numbers, w_number)
    tl.store(numbers + 1, l_number)
    if KIND == "fixed":
        given = _number(shift_value, shift)
    else:
        given = _moving_shift(
            shift_mean, shift_count, pending_sum, pending_count, w_sum, w_finite, l_sum, l_finite, decay, KIND, UPDATE
        )
    used = _shift_of_rewards(given, beta, LOSS)
    if CLASS_MEAN:
        w_count = _divisor(w_number.to(tl.float64) if CLASS_COUNT else _number(positive_count, positive_normalizer))
        l_count = _divisor(l_number.to(tl.float64) if CLASS_COUNT else _number(negative_count, negative_normalizer))
    else:
        w_count = _divisor(_number(sequence_count, sequence_normalizer))
        l_count = w_count
    w_weight, l_weight = desirable_weight / w_count, undesirable_weight / l_count
    summed = tl.zeros([BLOCK], tl.float64)
    w_total, l_total = _zeros(tl.float64, BLOCK)
    w_positions, l_positions = _zeros(tl.int64, BLOCK)
    for start in range(0, sequences, BLOCK):
        s = start + tl.arange(0, BLOCK)
        inside = s < sequences
        w, l, _, reward = _classes(s, inside, sums, desirable, ref_logps, beta)
        sign = tl.where(w, 1.0, -1.0)
        losses, rises = unpaired_loss(sign * (reward - used), LOSS)
        weight = tl.where(w, w_weight, l_weight)
        if sample_weight is not None:
            weight *= tl.load(sample_weight + s, mask=inside, other=0.0).to(tl.float64)
        summed += tl.where(inside, losses * weight, 0.0)
        tl.store(slope + s, saturate(beta * sign * rises * weight), mask=inside)
        w_total, w_positions = _with_logits(w_total, w_positions, s, w, totals, positions)
        l_total, l_positions = _with_logits(l_total, l_positions, s, l, totals, positions)
    tl.store(loss, saturate(tl.sum(summed, 0)).to(tl.float32))
    tl.store(scalars, saturate(given).to(tl.float32))
    if totals is not None:
        _store_mean(scalars + 1, w_total, w_positions)
        _store_mean(scalars + 2, l_total, l_positions)


def value_and_pointer(number: float | Tensor | None, device: torch.device) -> tuple[float, Tensor | None]:
    """What a kernel takes for a number or a 0-d tensor: a pointer where that is on the device, else its value."""
    if isinstance(number, Tensor) and number.device == device:
        return 0.0, number
    return float(number or 0.0), None


def pair_objective(
    sums: Tensor,
    counts: Tensor,
    totals: Tensor | None,
    positions: Tensor | None,
    ref_logps: Tensor | None,
    pair_normalizer: float | Tensor | None,
    token_normalizer: float | Tensor | None,
    spec: PairSpec,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, scalars (3,), logps, rewards (S,) float32, slope (S,) float64. One launch.

    Args as of :class:`fused_pref.losses.pair.PairObjective`, and ``totals`` and ``positions`` of
    :class:`fused_pref.losses.scores.Scores`.
    """
    sequences, device = sums.shape[0], sums.device
    loss = torch.empty((), dtype=torch.float32, device=device)
    scalars = torch.empty(3, dtype=torch.float32, device=device)
    logps = torch.empty(sequences, dtype=torch.float32, device=device)
    rewards, slope, pairs = torch.empty_like(logps), torch.empty_like(sums), sequences // 2
    pair_count, pair_pointer = value_and_pointer(pairs if pair_normalizer is None else pair_normalizer, device)
    token_count, token_pointer = value_and_pointer(token_normalizer, device)
    launch(
        _pair_objective_kernel, (1,), device,
        sums, counts, totals, positions, ref_logps, pair_pointer, token_pointer, loss, scalars, logps, rewards, slope,
        pairs=pairs, pair_count=pair_count, token_count=token_count, beta=spec.beta, smoothing=spec.label_smoothing,
        cpo_alpha=spec.cpo_alpha, gamma=spec.simpo_gamma, alpha=spec.alpha,
        LOSS=spec.loss_type, AVERAGE=spec.loss_type in AVERAGED, ALPHA=spec.alpha != 0,
        NLL=spec.nll_reduction if spec.cpo_alpha else None, TOKEN_COUNT=token_normalizer is None,
        BLOCK=configs.OBJECTIVE.block, **configs.OBJECTIVE.options,
    )  # fmt: skip
    return loss, scalars, logps, rewards, slope


def unpaired_objective(
    sums: Tensor,
    totals: Tensor | None,
    positions: Tensor | None,
    desirable: Tensor,
    ref_logps: Tensor,
    sample_weight: Tensor | None,
    shift: float | Tensor | ShiftMemory,
    sequence_normalizer: float | Tensor | None,
    class_normalizer: tuple[float | Tensor, float | Tensor] | None,
    spec: UnpairedSpec,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, scalars (3,), class counts (2,), logps, rewards (S,), slope (S,) float64; updates a shift. One launch.

    Args as of :class:`fused_pref.losses.unpaired.UnpairedObjective`, and ``totals`` and ``positions`` of
    :class:`fused_pref.losses.scores.Scores`.
    """
    sequences, device = sums.shape[0], sums.device
    loss = torch.empty((), dtype=torch.float32, device=device)
    scalars = torch.empty(3, dtype=torch.float32, device=device)
    numbers = torch.empty(2, dtype=torch.int64, device=device)
    logps = torch.empty(sequences, dtype=torch.float32, device=device)
    rewards, slope = torch.empty_like(logps), torch.empty_like(sums)
    given = sequences if sequence_normalizer is None else sequence_normalizer
    sequence_count, sequence_pointer = value_and_pointer(given, device)
    positive, negative = class_normalizer or (None, None)
    positive_count, positive_pointer = value_and_pointer(positive, device)
    negative_count, negative_pointer = value_and_pointer(negative, device)
    if isinstance(shift, ShiftMemory):
        *state, kind, update, decay = shift
        shift_value, shift_pointer = 0.0, None
    else:
        state, kind, update, decay = [None] * 4, "fixed", None, 0.0
        shift_value, shift_pointer = value_and_pointer(shift, device)
    launch(
        _unpaired_objective_kernel, (1,), device,
        sums, totals, positions, desirable, ref_logps, sample_weight, shift_pointer, *state,
        sequence_pointer, positive_pointer, negative_pointer, loss, scalars, numbers, logps, rewards, slope,
        sequences=sequences, shift_value=shift_value, sequence_count=sequence_count, positive_count=positive_count,
        negative_count=negative_count, beta=spec.beta, decay=decay, desirable_weight=spec.desirable_weight,
        undesirable_weight=spec.undesirable_weight, LOSS=spec.loss_type,
        CLASS_MEAN=spec.reduction == "class_mean", CLASS_COUNT=class_normalizer is None, KIND=kind, UPDATE=update,
        BLOCK=configs.OBJECTIVE.block, **configs.OBJECTIVE.options,
    )  # fmt: skip
    return loss, scalars, numbers, logps, rewards, slope
