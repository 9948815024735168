"""BCO in one launch, per-sequence sums to loss, slopes and everything that is reported; and what objectives share.

One program walks the sequences in blocks, in a fixed order, so that results repeat bitwise. ``loss`` is a tensor of
its own, because a caller may change it in place; ``scalars`` receives float32: the shift (pairs: NLL), mean logits of
the chosen and of the rejected sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_pref.ops.interface import ShiftMemory, UnpairedSpec
from fused_pref.ops.triton import configs
from fused_pref.ops.triton.launch import launch, mark_changed
from fused_pref.ops.triton.losses import saturate, unpaired_loss


@triton.jit
def number(value, pointer):
    """A number (float64) that is given by value or in memory."""
    if pointer is not None:
        return tl.load(pointer).to(tl.float64)
    else:
        return tl.cast(value, tl.float64)


@triton.jit
def divisor(number):
    """Infinity for a normalizer of 0, so that a finite total over it is 0."""
    return tl.where(number > 0, number, float("inf"))


@triton.jit
def zeros(TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Sums under way: of the chosen or desirable sequences, and of the others."""
    return tl.zeros([BLOCK], TYPE), tl.zeros([BLOCK], TYPE)


@triton.jit
def with_logits(total, positions_sum, s, members, totals, positions):
    """Σ z and the number of its positions, with those of the ``members`` of sequences ``s``."""
    if totals is not None:
        total += tl.load(totals + s, mask=members, other=0.0)
        positions_sum += tl.load(positions + s, mask=members, other=0)
    return total, positions_sum


@triton.jit
def store_mean(out, total, positions_sum):
    """The mean logit from sums of z and of positions, 0 without a position."""
    mean = tl.sum(total, 0) / tl.maximum(tl.sum(positions_sum, 0), 1).to(tl.float64)
    tl.store(out, saturate(mean).to(tl.float32))


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
    w_sum, l_sum = zeros(tl.float64, BLOCK)
    w_finite, l_finite = zeros(tl.int64, BLOCK)
    w_number, l_number = zeros(tl.int64, BLOCK)
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
        given = number(shift_value, shift)
    else:
        given = _moving_shift(
            shift_mean, shift_count, pending_sum, pending_count, w_sum, w_finite, l_sum, l_finite, decay, KIND, UPDATE
        )
    used = _shift_of_rewards(given, beta, LOSS)
    if CLASS_MEAN:
        w_count = divisor(w_number.to(tl.float64) if CLASS_COUNT else number(positive_count, positive_normalizer))
        l_count = divisor(l_number.to(tl.float64) if CLASS_COUNT else number(negative_count, negative_normalizer))
    else:
        w_count = divisor(number(sequence_count, sequence_normalizer))
        l_count = w_count
    w_weight, l_weight = desirable_weight / w_count, undesirable_weight / l_count
    summed = tl.zeros([BLOCK], tl.float64)
    w_total, l_total = zeros(tl.float64, BLOCK)
    w_positions, l_positions = zeros(tl.int64, BLOCK)
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
        w_total, w_positions = with_logits(w_total, w_positions, s, w, totals, positions)
        l_total, l_positions = with_logits(l_total, l_positions, s, l, totals, positions)
    tl.store(loss, saturate(tl.sum(summed, 0)).to(tl.float32))
    tl.store(scalars, saturate(given).to(tl.float32))
    if totals is not None:
        store_mean(scalars + 1, w_total, w_positions)
        store_mean(scalars + 2, l_total, l_positions)


def value_and_pointer(number: float | Tensor | None, device: torch.device) -> tuple[float, Tensor | None]:
    """What a kernel takes for a number or a 0-d tensor: a pointer where that is on the device, else its value."""
    if isinstance(number, Tensor) and number.device == device:
        return 0.0, number
    return float(number or 0.0), None


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
        if update is not None:
            mark_changed(*state)
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
