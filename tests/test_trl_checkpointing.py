"""Activation checkpointing by names that no supported transformers warns of."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl_models import TRAINING, llama

from fused_pref.trl import BCOConfig, CPOConfig
from fused_pref.trl.checkpointing import no_checkpointing, use_new_names


def flags(model: torch.nn.Module) -> dict[str, Any]:
    return {name: vars(layer).get("gradient_checkpointing") for name, layer in model.named_modules()}


@pytest.mark.parametrize("adapted", [False, True])
def test_layers_are_as_they_were(adapted: bool) -> None:
    model: Any = llama(use_cache=False)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    first = model.model.layers[0]
    first.gradient_checkpointing = False  # as with every second layer
    if adapted:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT goes by the old names
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    before = flags(model)
    assert True in before.values()
    with no_checkpointing(model):
        assert True not in flags(model).values()
    assert flags(model) == before


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
