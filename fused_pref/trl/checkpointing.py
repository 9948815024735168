"""Activation checkpointing in training arguments, which newer transformers renamed."""

from typing import Any

NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def use_new_names(config: Any) -> None:
    """Give training arguments by their new names, where there are any: TRL's defaults have the old ones, which warn."""
    for old, new in NAMES.items():
        if getattr(config, new, ...) is None:
            setattr(config, new, getattr(config, old))
