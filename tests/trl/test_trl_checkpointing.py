"""Activation checkpointing by names that no supported transformers warns of."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trl_models import TRAINING

from fused_pref.trl import BCOConfig, CPOConfig
from fused_pref.trl.checkpointing import use_new_names


def test_new_names_are_given_where_there_are_any() -> None:
    old: Any = SimpleNamespace(gradient_checkpointing=True, gradient_checkpointing_kwargs=None)
    use_new_names(old)
    assert vars(old) == {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": None}
    new: Any = SimpleNamespace(
        gradient_checkpointing=True,
        activation_checkpointing=None,
        gradient_checkpointing_kwargs={"a": 1},
        activation_checkpointing_kwargs={"b": 2},
    )
    use_new_names(new)
    assert new.activation_checkpointing is True
    assert new.activation_checkpointing_kwargs == {"b": 2}


@pytest.mark.parametrize("kind", [CPOConfig, BCOConfig])
@pytest.mark.parametrize("given", [{}, {"gradient_checkpointing": True}, {"gradient_checkpointing": False}])
def test_configurations_do_not_warn(kind: Any, given: dict[str, Any], tmp_path: Path) -> None:
    rest = {name: value for name, value in TRAINING.items() if name != "gradient_checkpointing"}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        config = kind(str(tmp_path), **rest, **given)
    assert not [str(warning.message) for warning in seen if "checkpointing" in str(warning.message)]
    assert config.gradient_checkpointing is given.get("gradient_checkpointing", True)
