"""Argument checks: every message names the argument, what was expected and what came."""

import contextlib
import contextvars
import functools
import itertools
import math
import numbers
import os
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
Result = TypeVar("Result")
LEAST, LARGEST = -(2**63), 2**63 - 1

# Characters of what came.
LONGEST = 120
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80

_checks = contextvars.ContextVar("fused_pref_checks", default=False)


@contextlib.contextmanager
def checks() -> Iterator[None]:
    """Within this context, and in this thread, also check values on a device, at the price of host synchronisations.

    Labels outside the vocabulary, malformed ``cu_seqlens``, normalizers that are not positive, ``sample_weight`` below
    0, and NaN or infinity in ``ref_logps``, ``delta``, ``kl``, ``sample_weight``, ``token_weight`` or log-probs raise
    ``ValueError`` there, and so does an objective of your own whose gradients would be lost or whose units look at
    others. ``FUSED_PREF_CHECKS=1`` in the environment does the same for the whole process. Compiled graphs are not
    checked.
    """
    token = _checks.set(True)
    try:
        yield
    finally:
        _checks.reset(token)


def checking() -> bool:
    """Whether :func:`checks` is in force."""
    if torch.compiler.is_compiling():
        return False
    return _checks.get() or os.environ.get("FUSED_PREF_CHECKS", "0") not in ("", "0")


def readable(tensor: Tensor) -> bool:
    """Whether reading values of this tensor is free (on the CPU, not while compiling) or asked for."""
    return checking() or (tensor.device.type == "cpu" and not torch.compiler.is_compiling())


def remembered(*names: str) -> Callable[[Callable[[Mapping[str, Any]], Result]], Callable[[Mapping[str, Any]], Result]]:
    """Decorate a function of keywords that looks at these alone: a set of values is validated once.

    The result must not be changed by whoever gets it. Of malformed values nothing is remembered.
    """

    def decorate(function: Callable[[Mapping[str, Any]], Result]) -> Callable[[Mapping[str, Any]], Result]:
        @functools.lru_cache(maxsize=256, typed=True)
        def known(*key: Any) -> Result:
            return function(dict(zip(names, key, strict=False)))

        @functools.wraps(function)
        def call(keywords: Mapping[str, Any]) -> Result:
            if torch.compiler.is_compiling():
                return function(keywords)
            key = values = tuple(map(keywords.__getitem__, names))
            for value in values:
                if isinstance(value, tuple):  # into which ``typed`` does not look
                    key += tuple(map(type, value))
            try:
                hash(key)
            except TypeError:  # a list, or malformed: validated in every call
                return function(keywords)
            return known(*key)

        return call

    return decorate


def describe(value: Any) -> str:
    """What came, for a message."""
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        # A nested tensor has no shape.
        shape = "nested" if value.is_nested else f"of shape {tuple(value.shape)}"
        return f"{_article(kind)} tensor {shape} on {value.device}"
    text = " ".join(line.strip() for line in _short.repr(value).splitlines())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _article(kind: str) -> str:
    return f"an {kind}" if kind.startswith("int") else f"a {kind}"


def fail(name: str, expected: str, value: Any, error: type[Exception] = ValueError) -> Exception:
    """The exception to raise for argument ``name``."""
    return error(f"{name} must be {expected}; got {describe(value)}")


def finite(
    name: str, value: Any, expected: str = "a finite number", good: Callable[[float], bool] = math.isfinite
) -> float:
    """A finite real number (bools are not numbers), or one that is ``good``, which ``expected`` describes."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise fail(name, expected, value, TypeError)
    try:
        number = float(value)
    except OverflowError:  # an integer or a fraction beyond float64
        number = math.inf
    if torch.compiler.is_compiling():
        # A number that varies, which a compiler would keep symbolic, becomes a constant of the graph.
        number = math.fsum((number,))
    if not good(number):
        raise fail(name, expected, value)
    return number


def positive(name: str, value: Any, expected: str = "a finite number > 0") -> float:
    """A finite number above 0."""
    return finite(name, value, expected, lambda number: 0 < number < math.inf)


def not_negative(name: str, value: Any, expected: str = "a finite number >= 0") -> float:
    """A finite number of at least 0."""
    return finite(name, value, expected, lambda number: 0 <= number < math.inf)


def within(name: str, value: Any, low: float, high: float) -> float:
    """A number in [low, high)."""
    return finite(name, value, f"a number in [{low:g}, {high:g})", lambda number: low <= number < high)


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise fail(name, "True or False", value, TypeError)
    return value


def integer(name: str, value: Any, most: int = LARGEST) -> int:
    """An integer (bools are not) of 64 bits."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise fail(name, "an integer", value, TypeError)
    if not LEAST <= int(value) <= most:
        raise fail(name, f"an integer of 64 bits, at most {most}", value)
    return int(value)


def at_least(name: str, value: Any, least: int, *, optional: bool = False) -> Any:
    """An integer of at least ``least``; ``optional``: or None."""
    if value is None and optional:
        return None
    number = integer(name, value)
    if number < least:
        raise fail(name, f"an integer >= {least}{', or None' if optional else ''}", value)
    return number


def choice(name: str, value: Any, allowed: tuple[str | None, ...]) -> Any:
    """One of the allowed values."""
    if value is not None and not isinstance(value, str):
        raise fail(name, f"one of {allowed}", value, TypeError)
    if value not in allowed:
        raise fail(name, f"one of {allowed}", value)
    return value


def choices(name: str, value: Any, allowed: tuple[Any, ...], *, empty: bool = True) -> None:
    """A collection whose entries are among the allowed values; without ``empty``, at least one."""
    if isinstance(value, str) or not isinstance(value, Collection):
        raise fail(name, f"a sequence, of {allowed}", value, TypeError)
    if not value and not empty:
        raise fail(name, f"at least one of {allowed}", value)
    for entry in value:
        if entry not in allowed:
            raise fail(name, f"of {allowed}", entry)


def tensor(
    name: str,
    value: Any,
    symbol: str,
    shape: tuple[int, ...] | None,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> Tensor:
    """A plain tensor of this shape (None: any), one of these dtypes (none: any), on this device (None: any).

    It holds its values one by one. ``symbol`` is the shape in the symbols of the documentation, as ``"(S, T)"``.
    """
    if not isinstance(value, Tensor):
        error = fail(name, _kind_of(symbol, dtypes), value, TypeError)
        layer = name == "weight" and isinstance(getattr(value, "weight", None), Tensor)
        raise TypeError(f"{error}: pass its .weight") if layer else error
    if type(value) is not Tensor and is_dtensor(value):
        raise TypeError(
            f"{name} must be a plain tensor; got a DTensor: call .full_tensor() to gather it, inside FSDP run the head "
            "in the forward of the module that owns it"
        )
    if value.is_nested:
        raise TypeError(f"{name} must be dense; got {describe(value)}: pack its sequences (cu_seqlens) or pad them")
    if value.is_quantized:
        raise TypeError(f"{name} must be dense; got {describe(value)}: call .dequantize() first")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be dense; got layout {value.layout}: call .to_dense() first")
    if value.is_meta:
        raise fail(name, "on a device that holds values", value)
    if dtypes and value.dtype not in dtypes:
        raise fail(name, _kind_of(symbol, dtypes), value, TypeError)
    if shape is not None and value.shape != shape:
        raise fail(name, symbol if symbol == str(shape) else f"{symbol} = {shape}", value)
    if device is not None and value.device != device:
        raise fail(name, f"on {device} like the other tensors", value)
    return value


def _kind_of(symbol: str, dtypes: tuple[torch.dtype, ...]) -> str:
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{_article(kinds)} tensor {symbol}" if kinds else f"a tensor {symbol}"


def is_dtensor(value: Any) -> bool:
    """By name: importing DTensor takes longer than the rest of the library."""
    return type(value).__name__ == "DTensor"


def tensor_or_none(name: str, value: Any, symbol: str) -> None:
    """A tensor or None; shape and dtype are checked later, where they are known."""
    if value is not None and not isinstance(value, Tensor):
        raise fail(name, f"a tensor {symbol} or None", value, TypeError)


def boundaries(name: str, value: Any, total: int, device: torch.device) -> Tensor:
    """``cu_seqlens`` of packed inputs of ``total`` positions."""
    value = tensor(name, value, "(S+1,)", None, (torch.int32, torch.int64), device)
    if value.dim() != 1 or value.numel() < 1:
        raise fail(name, "(S+1,) with S+1 >= 1", value)
    if readable(value):
        ends = value.tolist()
        if ends[0] != 0 or ends[-1] != total or any(b < a for a, b in itertools.pairwise(ends)):
            shown = f"{ends[:8]}{'…' if len(ends) > 8 else ''} ending at {ends[-1]}"
            raise ValueError(f"{name} must start at 0, never fall and end at N_total = {total}; got {shown}")
    return value


def saved(
    state_dict: Mapping[str, Any],
    key: str,
    symbol: str,
    shape: tuple[int, ...] | None,
    dtypes: tuple[torch.dtype, ...],
    *,
    negative: bool = True,
) -> None:
    """Validate an entry of a state dict, finite and, without ``negative``, >= 0; one that is missing is not looked at.

    Raises:
        ValueError, TypeError: a malformed entry.
    """
    if key not in state_dict:
        return
    name = f"state_dict[{key!r}]"
    value = tensor(name, state_dict[key], symbol, shape, dtypes)
    if not value.isfinite().all() or not (negative or (value >= 0).all()):
        raise ValueError(f"{name} must be finite{'' if negative else ' and >= 0'}; got {describe(value.tolist())}")


def normalizer(name: str, value: Any, *, zero: bool = False) -> float | Tensor:
    """A count to divide by: a number or a 0-d tensor, above 0 (``zero``: or 0)."""
    expected = f"a finite number or 0-d tensor {'>=' if zero else '>'} 0"
    check = not_negative if zero else positive
    if not isinstance(value, Tensor):
        return check(name, value, expected)
    if tensor(name, value, "()", None, ()).dim() != 0 or value.dtype is torch.bool or value.is_complex():
        raise fail(name, expected, value)
    if readable(value):
        check(name, value.item(), expected)
    return value.detach()


def scalar(name: str, value: Any, others: str = "") -> float | Tensor:
    """A finite number, or a floating 0-d tensor, detached, which is looked at under :func:`checks`.

    ``others`` is what else the argument may be, for the message.
    """
    if not isinstance(value, Tensor):
        return finite(name, value, f"{others}a finite number or a 0-d tensor")
    if tensor(name, value, "()", None, ()).dim() != 0 or not value.is_floating_point():
        raise fail(name, f"{others}a finite number or a 0-d floating tensor", value)
    values(name, value, torch.isfinite, "finite")
    return value.detach()


def values(name: str, value: Tensor, good: Callable[[Tensor], Tensor], expected: str) -> None:
    """Under :func:`checks`, raise for the first entry that is not ``good``; else nothing is computed."""
    if not checking():
        return
    bad = (~good(value)).nonzero()
    if bad.shape[0]:
        place = bad[0].tolist()
        raise ValueError(f"{name} must be {expected}; got {value[tuple(place)].item()} at {place}")
