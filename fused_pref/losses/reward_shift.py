"""BCO's reward shift δ as a module with exactly resumable state."""

import copy
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from fused_pref import validate
from fused_pref.losses.state import ExactModule
from fused_pref.ops.interface import ShiftMemory
from fused_pref.ranks import group_of

Kind = Literal["running_mean", "ema", "fixed"]
Update = Literal["forward", "step"]
KINDS = get_args(Kind)
UPDATES = get_args(Update)


class RewardShift(ExactModule):
    """Reward shift δ of BCO (arXiv 2404.04656), subtracted from every reward.

    Args:
        kind: ``"running_mean"``: pooled cumulative mean of all rewards seen. ``"ema"``: ½(m⁺ + m⁻) of per-class
            exponential moving averages of class means, m ← decay·m + (1−decay)·mean, each starting at its first mean
            and unchanged while its class is absent; the one that exists, or 0. ``"fixed"``: always ``value``.
        decay: of ``"ema"``, in [0, 1).
        value: of ``"fixed"``, finite.
        update: ``"forward"``: a forward in training mode with gradients enabled updates with its batch, then uses δ.
            ``"step"``: δ is that of the last :meth:`step` (0 before the first); such forwards only gather statistics.
        process_group: ranks (or 1-d DeviceMesh) over which statistics are reduced where ``torch.distributed`` is
            initialised; None is the whole world, as for ``SyncBatchNorm``. Every rank then calls every updating
            forward (or ``step``).

    Evaluation, ``no_grad`` and recomputation inside a backward never update (so reentrant activation checkpointing,
    whose first pass runs without gradients, never does: use the non-reentrant form around a loss). A reward that is
    NaN or infinite is left out of the statistics, so that one bad batch does not spoil δ for good. The state is
    float64 and int64, stays so under ``.bfloat16()``, and is part of ``state_dict``.

    Raises:
        ValueError, TypeError: unknown ``kind`` or ``update``, ``decay`` outside [0, 1), ``value`` not finite; of
            ``load_state_dict`` an entry that no shift can have saved (missing keys are left to PyTorch).
    """

    mean: Tensor
    count: Tensor
    pending_sum: Tensor
    pending_count: Tensor

    def __init__(
        self,
        kind: Kind = "running_mean",
        *,
        decay: float = 0.9,
        value: float = 0.0,
        update: Update = "forward",
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.kind = validate.choice("kind", kind, KINDS)
        self.decay = validate.within("decay", decay, 0.0, 1.0)
        self.value = validate.finite("value", value)
        self.update = validate.choice("update", update, UPDATES)
        self.process_group = group_of("process_group", process_group)
        self.register_buffer("mean", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("pending_sum", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("pending_count", torch.zeros(2, dtype=torch.int64))

    def forward(self, rewards: Tensor, desirable: Tensor) -> Tensor:
        """δ for a batch, 0-d float64, after the update that ``update`` asks for.

        Args:
            rewards: (S,) floating, β(logps − ref_logps), on the device of the state.
            desirable: bool (S,).

        Raises:
            ValueError, TypeError: malformed input.
        """
        device = self.mean.device
        rewards = validate.tensor("rewards", rewards, "(S,)", None, validate.FLOATS, device)
        if rewards.dim() != 1:
            raise validate.fail("rewards", "(S,)", rewards)
        desirable = validate.tensor("desirable", desirable, "(S,)", tuple(rewards.shape), (torch.bool,), device)
        delta, state = self.peek(rewards, desirable)
        self.commit(state)
        return delta

    @property
    def collective(self) -> bool:
        """Whether a forward would talk to other ranks now."""
        return self.update == "forward" and self.updating() and dist.is_available() and dist.is_initialized()

    def updating(self, *, recomputed: bool = False) -> bool:
        """Whether a forward would update now: in training, with gradients; ``recomputed``: or did when it first ran."""
        if self.kind == "fixed" or not self.training or not torch.is_grad_enabled():
            return False
        # A recomputation (activation checkpointing) runs within a backward.
        return recomputed or torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1

    def current(self) -> Tensor:
        """δ as the state is now, 0-d float64."""
        return self._delta(self.memory)

    @property
    def memory(self) -> ShiftMemory:
        """The state as it is now, and how a forward would change it."""
        update = self.update if self.updating() else None
        return ShiftMemory(self.mean, self.count, self.pending_sum, self.pending_count, self.kind, update, self.decay)

    def peek(self, rewards: Tensor, desirable: Tensor) -> tuple[Tensor, ShiftMemory | None]:
        """δ for a batch, and the state to :meth:`commit` once the batch has succeeded (None: unchanged)."""
        state = self.memory
        if state.update is None:
            return self._delta(state), None
        rewards = rewards.detach().double()
        members = torch.stack((desirable, ~desirable)) & rewards.isfinite()
        total = torch.where(members, rewards, 0).sum(1)
        number = members.sum(1)
        if self.update == "step":
            pending = {"pending_sum": state.pending_sum + total, "pending_count": state.pending_count + number}
            return self._delta(state), state._replace(**pending)
        folded = self._fold(state, total, number)
        return self._delta(folded), folded

    @torch.no_grad()
    def commit(self, state: ShiftMemory | None) -> None:
        """Take over a state from :meth:`peek`."""
        if state is not None:
            for name in self._buffers:
                getattr(self, name).copy_(getattr(state, name))

    def step(self) -> None:
        """Fold in what was gathered since the last call, over all ranks; for ``update="step"``, else nothing.

        Call it once per optimiser step, beside ``optimizer.step()``.
        """
        if self.kind == "fixed" or self.update != "step":
            return
        state = self.memory
        folded = self._fold(state, state.pending_sum, state.pending_count)
        pending = {"pending_sum": torch.zeros_like(state.pending_sum), "pending_count": torch.zeros_like(state.count)}
        self.commit(folded._replace(**pending))

    def _fold(self, state: ShiftMemory, total: Tensor, number: Tensor) -> ShiftMemory:
        """The state after rewards of both classes, of which there are sums and counts on each rank."""
        if dist.is_available() and dist.is_initialized():
            both = torch.cat((total, number.double()))
            dist.all_reduce(both, group=self.process_group)
            total, number = both[:2], both[2:].round().long()
        if self.kind == "running_mean":
            total, number = F.pad(total.sum()[None], (0, 1)), F.pad(number.sum()[None], (0, 1))
        count = state.count + number
        mean = total / number.clamp(min=1)
        if self.kind == "running_mean":
            moved = state.mean + (mean - state.mean) * (number.double() / count.clamp(min=1))
        else:
            moved = torch.where(state.count > 0, self.decay * state.mean + (1 - self.decay) * mean, mean)
        return state._replace(mean=torch.where(number > 0, moved, state.mean), count=count)

    def _delta(self, state: ShiftMemory) -> Tensor:
        if self.kind == "fixed":
            return torch.full_like(state.mean[0], self.value)
        if self.kind == "running_mean":
            return state.mean[0].clone()
        exists = (state.count > 0).double()
        return (state.mean * exists).sum() / exists.sum().clamp(min=1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Refuse what no shift can have saved, before anything is changed."""
        for name in ("mean", "pending_sum"):
            validate.saved(state_dict, prefix + name, "(2,)", (2,), validate.FLOATS)
        for name in ("count", "pending_count"):
            validate.saved(state_dict, prefix + name, "(2,)", (2,), validate.INTEGERS, negative=False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A process group cannot be copied: the copy keeps it."""
        memo[id(self.process_group)] = self.process_group
        copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(super().__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """A process group belongs to a process: it is left out of pickles."""
        return {**super().__getstate__(), "process_group": None}

    def extra_repr(self) -> str:
        """The options that matter to the kind."""
        options = {"ema": f", decay={self.decay}", "fixed": f", value={self.value}"}.get(self.kind, "")
        return f"{self.kind!r}{options}, update={self.update!r}"


def reward_shift(keywords: Mapping[str, Any], device: torch.device | None = None) -> RewardShift | float | Tensor:
    """``delta``: a RewardShift on this device (None: any), a finite number or a detached 0-d tensor."""
    delta = keywords["delta"]
    if isinstance(delta, RewardShift):
        if device is not None and delta.mean.device != device:
            place = f"a RewardShift on {device} like the other tensors"
            raise ValueError(f"delta must be {place}; got one on {delta.mean.device}")
        return delta
    return validate.scalar("delta", delta, "a RewardShift, ")
