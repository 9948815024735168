"""Valid calls of the functions, a change of one of them, and what is wrong with how it is refused."""

import functools
import re
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from harness import make_batch, make_hidden, reference_logps

import fused_pref as fp
from fused_pref import keywords

S, T, D, V = 4, 5, 6, 11
LENGTHS = [4, 5, 2, 3]
# The functions, and the keywords of each.
FUNCTIONS: dict[str, type] = {
    "token_logps": keywords.LogitsKeywords,
    "sequence_logps": keywords.SequenceLogitsKeywords,
    "cpo_loss": keywords.CPOLogitsKeywords,
    "dpo_loss": keywords.DPOLogitsKeywords,
    "bco_loss": keywords.BCOLogitsKeywords,
    "kto_loss": keywords.KTOLogitsKeywords,
    "preference_loss": keywords.PreferenceLogitsKeywords,
    "linear_token_logps": keywords.LinearKeywords,
    "linear_sequence_logps": keywords.SequenceLinearKeywords,
    "linear_cpo_loss": keywords.CPOLinearKeywords,
    "linear_dpo_loss": keywords.DPOLinearKeywords,
    "linear_bco_loss": keywords.BCOLinearKeywords,
    "linear_kto_loss": keywords.KTOLinearKeywords,
    "linear_preference_loss": keywords.PreferenceLinearKeywords,
}
# The modules, and the function that each evaluates.
MODULES: dict[str, str] = {
    f"{prefix}{name}Loss": f"{prefix.lower()}{'_' if prefix else ''}{name.lower()}_loss"
    for prefix in ("", "Linear")
    for name in ("CPO", "DPO", "BCO", "KTO", "Preference")
}


def margin(chosen: fp.Sequences, rejected: fp.Sequences) -> torch.Tensor:
    """An objective of the user's."""
    return rejected.logps - chosen.logps


def built(name: str) -> Callable[..., Any]:
    """A module, to be built from keywords."""
    build = getattr(fp, name)
    return functools.partial(build, margin) if name.endswith("PreferenceLoss") else build


def valid(name: str, *, packed: bool = False) -> dict[str, Any]:
    """Arguments of a function, in its order; of a module those of a call."""
    if name in MODULES:
        return {key: value for key, value in valid(MODULES[name], packed=packed).items() if key != "objective"}
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
    if "bco" in name or "kto" in name:
        arguments["desirable"] = torch.tensor([True, False, True, False])
    if "desirable" in arguments or "dpo" in name:
        arguments["ref_logps"] = reference_logps(S)
    if "preference" in name:
        arguments["objective"] = margin
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


def refusal(error: type[Exception], message: str, function: Callable[..., Any], *given: Any, **keywords: Any) -> str:
    """The same of a call whose whole message is known."""
    return complaint(functools.partial(function, *given), keywords, error, f"^{re.escape(message)}$")
