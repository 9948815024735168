"""Activation checkpointing by what every transformers has: newer ones renamed its methods and arguments."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


@contextlib.contextmanager
def no_checkpointing(model: nn.Module) -> Iterator[None]:
    """No checkpointing in a forward; afterwards the layers that had it have it again, in the same way."""
    # In their own dictionaries: an adapter's `getattr` would give what belongs to the model inside.
    layers = [layer for layer in model.modules() if vars(layer).get("gradient_checkpointing")]
    for layer in layers:
        vars(layer)["gradient_checkpointing"] = False
    try:
        yield
    finally:
        for layer in layers:
            vars(layer)["gradient_checkpointing"] = True


def use_new_names(config: Any) -> None:
    """Give training arguments by their new names, where there are any: TRL's defaults have the old ones, which warn."""
    for old, new in NAMES.items():
        if getattr(config, new, ...) is None:
            setattr(config, new, getattr(config, old))
