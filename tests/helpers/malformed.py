"""Valid calls of the functions, a change of one of them, and what is wrong with how it is refused."""

import re
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from harness import make_batch, make_hidden, reference_logps

import fused_pref as fp

S, T, D, V = 4, 5, 6, 11
LENGTHS = [4, 5, 2, 3]

LOGITS = ("token_logps", "sequence_logps", "cpo_loss", "dpo_loss", "bco_loss")
LINEAR = tuple(f"linear_{name}" for name in LOGITS)
GROUPS: dict[str, tuple[str, ...]] = {
    "all": LOGITS + LINEAR,
    "logits": LOGITS,
    "linear": LINEAR,
    "cpo": ("cpo_loss", "linear_cpo_loss"),
    "dpo": ("dpo_loss", "linear_dpo_loss"),
    "bco": ("bco_loss", "linear_bco_loss"),
    "pairs": ("cpo_loss", "dpo_loss", "linear_cpo_loss", "linear_dpo_loss"),
    "referenced": ("dpo_loss", "bco_loss", "linear_dpo_loss", "linear_bco_loss"),
    "logps": ("token_logps", "sequence_logps", "linear_token_logps", "linear_sequence_logps"),
    "sequence": ("sequence_logps", "linear_sequence_logps"),
    "token": ("token_logps", "linear_token_logps"),
}

# group, changes, error, message
Row = tuple[str, dict[str, Any], type[Exception], str]


def each(group: str, argument: str, values: list[Any]) -> list[Row]:
    """A row for each (value, error, message) of an argument; the message comes after the argument's name."""
    return [(group, {argument: value}, error, rf"{argument}\b.*{text}") for value, error, text in values]


def names(group: str) -> tuple[str, ...]:
    """The functions of a group, or the one of this name."""
    return GROUPS.get(group, (group,))


def valid(name: str, *, packed: bool = False) -> dict[str, Any]:
    """Arguments of a function, in its order."""
    if name.startswith("linear_"):
        batch = make_hidden(S, T, D, V)
        arguments: dict[str, Any] = {"hidden": batch.hidden, "weight": batch.weight, "labels": batch.labels}
        rows = "hidden"
    else:
        logits = make_batch(S, T, V)
        arguments, rows = {"logits": logits.logits, "labels": logits.labels}, "logits"
    if packed:
        for key in (rows, "labels"):
            arguments[key] = torch.cat([arguments[key][s, :n] for s, n in enumerate(LENGTHS)])
        arguments["cu_seqlens"] = torch.tensor([0, *LENGTHS]).cumsum(0)
    if "bco" in name:
        arguments["desirable"] = torch.tensor([True, False, True, False])
    if "bco" in name or "dpo" in name:
        arguments["ref_logps"] = reference_logps(S)
    return arguments


def changed(arguments: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with some replaced; a function makes the new value of the old one."""
    new = {
        name: value(arguments[name]) if isinstance(value, FunctionType) else value for name, value in changes.items()
    }
    return {**arguments, **new}


def complaint(function: Callable[..., Any], arguments: Mapping[str, Any], error: type[Exception], match: str) -> str:
    """What is wrong with how a malformed call is refused; nothing if nothing is. Without ``assert``, for ``-O``."""
    try:
        function(**arguments)
    except Exception as caught:
        text = f"{type(caught).__name__}: {caught}"
        if type(caught) is not error:
            return f"not {error.__name__}, but {text}"
        if not re.search(match, str(caught)):
            return f"{match!r} is not in {text}"
        return f"not one line: {text}" if "\n" in text or len(text) > 600 else ""
    return "accepted"


def complaints(
    group: str, changes: Mapping[str, Any], error: type[Exception], match: str, *, packed: bool = False
) -> list[str]:
    """Of all functions of a group."""
    found = []
    for name in names(group):
        arguments = changed(valid(name, packed=packed), changes)
        found += [f"{name}: {text}" for text in [complaint(getattr(fp, name), arguments, error, match)] if text]
    return found
