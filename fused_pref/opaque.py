"""Functions that a compiler does not look into: in eager mode they are called as they are, in a graph each is one op.

In traces, and where tensors have no values (fake ones), each is one op, too.

An op gets tensors and one text. The text has the other arguments and, in place of a tensor, its number.
"""

import ast
import functools
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from inspect import signature
from typing import Any, TypeVar, cast, get_args

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type)
# Modes of tensors without values, and of tracing; and tensors that have values.
TRACING = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
PLAIN = (Tensor, torch.nn.Parameter)

# What the first entry of a tuple in the text says that the others make.
_MAKERS: dict[str, Callable[..., Any]] = {
    "dtype": lambda name: getattr(torch, name),
    "frozenset": lambda *parts: frozenset(parts),
    "tuple": lambda *parts: parts,
}
# The same text comes in every step.
_parse = functools.lru_cache(ast.literal_eval)


def argument(cls: Class) -> Class:
    """A dataclass or NamedTuple that may be an argument of an opaque function, or a part of one."""
    _MAKERS[cls.__name__] = cls
    return cls


def opaque(*, fake: Callable[..., Any], changes: int = 0, reads: bool = False) -> Callable[[Function], Function]:
    """Let ``torch.compile`` see one op, ``fused_pref::NAME``, in a function of positional arguments.

    They are tensors, numbers, names, None, dtypes, and tuples, frozensets and classes of them that :func:`argument`
    has named. A number is a constant of the graph: what varies with the batch has to be the size of a tensor. The
    annotation of the result is None, a tensor, or a tuple or NamedTuple of tensors and None, none of them bool and none
    of them an argument.

    Args:
        fake: gives empty tensors like the results, for the same arguments.
        changes: the tensors of so many of the first arguments are changed in place.
        reads: the function reads a value from the device, which no CUDA graph can hold.
    """

    def decorate(function: Function) -> Function:
        kind = signature(function).return_annotation
        op = _op(function, fake, changes, reads, kind)

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            eager = not torch.compiler.is_compiling() and not any(map(torch._C._get_dispatch_mode, TRACING))
            for value in arguments if eager else ():
                first = value[0] if isinstance(value, tuple) and value else value
                eager = eager and (not isinstance(first, Tensor) or type(first) in PLAIN)
            if eager:
                return function(*arguments)
            changed, tensors = [], []
            texts = encode(arguments[:changes], changed), encode(arguments[changes:], tensors)
            found = op(changed, tensors, *texts)
            if not isinstance(found, tuple | list):
                return found
            parts = [None if part.dtype == torch.bool else part for part in found]
            return kind(*parts) if hasattr(kind, "_fields") else tuple(parts)

        return cast(Function, call)

    return decorate


def _op(function: Callable[..., Any], fake: Callable[..., Any], changes: int, reads: bool, kind: Any) -> Any:
    """The op of a function whose result is of a kind. An empty bool tensor stands for a part that is None."""

    def through(other: Callable[..., Any]) -> Callable[..., Any]:
        def call(changed: Sequence[Tensor], tensors: Sequence[Tensor], first: str, rest: str) -> Any:
            result = other(*decode(first, changed), *decode(rest, tensors))
            if not isinstance(result, tuple):
                return result
            like = (*changed, *tensors)[0]
            return tuple([like.new_empty(0, dtype=torch.bool) if part is None else part for part in result])

        return call

    parts = getattr(kind, "_fields", get_args(kind))
    results = "Tensor" if kind is Tensor else f"({', '.join(['Tensor'] * len(parts))})"
    changed = "Tensor(a!)[]" if changes else "Tensor[]"
    op = torch.library.custom_op(
        f"fused_pref::{function.__name__}",
        through(function),
        mutates_args=("changed",) if changes else (),
        schema=f"({changed} changed, Tensor[] tensors, str first, str rest) -> {results}",
        tags=(torch.Tag.cudagraph_unsafe,) if reads else (),
    )
    op.register_fake(through(fake))
    return op


def encode(value: Any, tensors: list[Tensor]) -> str:
    """A value as text, by means that a compiler can see through; its tensors are added to the list."""
    if isinstance(value, Tensor):
        kind, parts = "Tensor", [len(tensors)]
        tensors.append(value)
    elif isinstance(value, torch.dtype):
        kind, parts = "dtype", [str(value).removeprefix("torch.")]
    elif isinstance(value, frozenset):
        kind, parts = "frozenset", sorted(value)
    elif isinstance(value, tuple):
        kind, parts = type(value).__name__, list(value)
    elif is_dataclass(value):
        kind, parts = type(value).__name__, [getattr(value, field.name) for field in fields(value)]
    else:
        return f"{value!r}"
    return f"({kind!r}, " + "".join([encode(part, tensors) + ", " for part in parts]) + ")"


def decode(text: str, tensors: Sequence[Tensor]) -> Any:
    """The value of :func:`encode`."""

    def made(value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        kind, *parts = value
        return tensors[parts[0]] if kind == "Tensor" else _MAKERS[kind](*map(made, parts))

    return made(_parse(text))
