"""What the ranks of a vocab-parallel head tell each other at the start of every call.

Four integers of each rank are gathered: its number of rows, its default budget, and two checksums of everything that
must be the same on all ranks, because what they exchange later would not fit together. Only where those differ do the
ranks exchange more: then all of them raise the same error.
"""

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_pref import validate
from fused_pref.head import budget as budgets
from fused_pref.head.budget import default_budget
from fused_pref.ranks import gathered, head_group, local_head

# What a rank sends, instead of its number of rows, when its arguments are malformed.
REFUSED = -1
# Odd numbers that spread their factors over 64 bits, as multiplicative hashes use them.
SPREAD = (-7046029254386353131, -4658895280553007687)
# Keywords that each rank may have its own of.
OWN = ("backend", "tp_group", "cp_group")


class Agreement:
    """One call of the ranks of a group.

    As a context manager, it tells the ranks that wait in :meth:`meet` if this rank's arguments are refused.
    """

    def __init__(self, group: Any, asked: Mapping[str, Any], *arguments: Any) -> None:
        """What a rank will tell the others.

        Args:
            group: the process group.
            asked: what must be the same on all ranks, by name: integer or 0-d tensors by their values, others by dtype
                and shape, numbers by their values, anything else by its ``repr``.
            arguments: those that tell the device.
        """
        self.group, self.asked, self.met = group, dict(asked), False
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        self.device = tensors[0].device if tensors else None

    def __enter__(self) -> "Agreement":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, TypeError | ValueError) and not self.met:
            with contextlib.suppress(RuntimeError):  # what is refused says more than ranks that do not answer
                gathered(integers((REFUSED, 0, 0, 0), self.device), self.group)
                _exchanged(f"{type(error).__name__}: {error}", self.group)

    def meet(self, weight: Tensor, asked: Mapping[str, Any], scored: Tensor) -> tuple[tuple[int, ...], int]:
        """Rows of each rank, and the smallest of their default budgets.

        Args:
            weight: (V of this rank, D).
            asked: more of what must be the same.
            scored: (S, T) or (N_total,), which labels count; N is named before labels that differ.

        Raises:
            ValueError: on every rank, if they ask for different things, or one of them refuses its arguments.
        """
        self.met = True
        asked, group = {**self.asked, **asked}, self.group
        texts = {name: _text(value) for name, value in asked.items()}
        digest = int.from_bytes(hashlib.blake2b(repr(texts).encode(), digest_size=8).digest(), "big", signed=True)
        exact = {name: value for name, value in asked.items() if _is_exact(value)}
        sums = {name: _placed(checksum(value.flatten()), weight.device) for name, value in exact.items()}
        budget = default_budget(budgets.memory_of(weight.device), *weight.shape, weight.dtype.itemsize)
        total = checksum(torch.stack(list(sums.values())))[None]
        numbers = torch.cat((integers((weight.shape[0], budget, digest), weight.device), total))
        ranks = gathered(numbers, group).tolist()
        if any(rank[0] == REFUSED or rank[2:] != ranks[0][2:] for rank in ranks):
            shown = {
                name: f"{value.item()}" if value.dim() == 0 else f"{texts[name]} of checksum {sums[name].item()}"
                for name, value in exact.items()
            }
            others = {name: text for name, text in texts.items() if name not in shown}
            _compare(_exchanged({**others, "N": f"{int(scored.sum())}", **shown}, group))
        return tuple(rank[0] for rank in ranks), min(rank[1] for rank in ranks)


def agreed(function: Callable[..., Any], tensors: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """Call a function of (hidden, weight, labels, ...) and all keywords on each rank: an error on one reaches all.

    The function gets plain tensors, and the :class:`Agreement` of this call as one more keyword, ``agreement``, if
    ranks share the head. They meet in :meth:`fused_pref.head.inputs.LinearInputs.make_shard`.
    """
    hidden, weight, labels, *others = tensors
    group = head_group(weight, keywords["tp_group"])
    names = [
        f"{name}[{i}]" if parameter.kind is parameter.VAR_POSITIONAL else name
        for name, parameter in list(inspect.signature(function).parameters.items())[3:-1]
        for i in range(len(others) if parameter.kind is parameter.VAR_POSITIONAL else 1)
    ]
    asked = {"the function": function.__name__, **dict(zip(names, others, strict=False)), **_shared(keywords)}
    with contextlib.nullcontext() if group is None else Agreement(group, asked, hidden, weight, labels) as agreement:
        hidden, weight, bias = local_head(hidden, weight, keywords["bias"])
        return function(hidden, weight, labels, *others, **{**keywords, "bias": bias, "agreement": agreement})


def _shared(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Those keywords of a call that must be the same on all ranks, pairs taken apart."""
    result: dict[str, Any] = {}
    for name, value in keywords.items():
        if isinstance(value, tuple | list):
            result |= {f"{name}[{number}]": part for number, part in enumerate(value)}
        elif name == "bias":
            result[name] = value is not None
        elif name not in OWN:
            result[name] = value
    return result


def integers(values: Iterable[int], device: torch.device | None) -> Tensor:
    """Int64 values on a device, by a fill each: copying them there would wait."""
    return torch.stack([torch.full((), value, dtype=torch.int64, device=device) for value in values])


def _placed(value: Tensor, device: torch.device) -> Tensor:
    """A 0-d integer on a device, to which one of the host comes as :func:`integers` do."""
    return integers((int(value),), device)[0] if value.device.type == "cpu" != device.type else value.to(device)


def checksum(values: Tensor) -> Tensor:
    """A checksum of the values and their order, for each row of (..., n); int64 (...,)."""
    bits = values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize])
    mixed = torch.arange(values.shape[-1], device=values.device) * SPREAD[0] + bits
    mixed = mixed * SPREAD[1]
    return ((mixed ^ (mixed >> 32)) * SPREAD[0]).sum(-1)


def _is_exact(value: Any) -> bool:
    """Whether a tensor must be the same bitwise; floats of a sequence may differ by how a rank rounds."""
    return isinstance(value, Tensor) and (value.dim() == 0 or not value.is_floating_point())


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return validate.describe(value.detach()).removesuffix(f" on {value.device}")
    if isinstance(value, torch.nn.Module):
        return f"{value!r} in {'training' if value.training else 'evaluation'}"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    if isinstance(value, float):
        return repr(int(value) if value.is_integer() else float(value))
    return repr(value)


def _exchanged(report: Any, group: Any) -> list[Any]:
    reports: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reports, report, group=group)
    return reports


def _compare(reports: list[Any]) -> None:
    for rank, report in enumerate(reports):
        if isinstance(report, str):
            raise ValueError(f"rank {rank} of tp_group refuses its arguments: {report}")
    for name in dict.fromkeys(name for report in reports for name in report):
        values = [report.get(name, "no such argument") for report in reports]
        if any(value != values[0] for value in values):
            shown = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            raise ValueError(f"ranks of tp_group must agree on {name}; got {shown}")
