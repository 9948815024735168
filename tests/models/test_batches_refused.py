"""Batches, losses and calls that the head inside of a model refuses."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from families import V, batch, family
from malformed import changed, complaint
from torch import nn
from trl_models import llama

import fused_pref as fp
from fused_pref.models import preference as models

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
MODEL = llama()
BATCH = {**batch(), "desirable": torch.tensor([True, False, True, False]), "ref_logps": torch.zeros(4)}
LOSSES: dict[str, Any] = {
    "none": None,
    "a name": "cpo",
    "a number": 3,
    "a builtin": int,
    "a function of something else": len,
    "a function of logits": fp.cpo_loss,
    "a loss of logits": fp.BCOLoss(),
    "a layer": nn.Linear(2, 2),
    "a layer in layers": nn.Sequential(nn.Linear(2, 2)),
    "a partial loss of logits": functools.partial(fp.cpo_loss, beta=0.1),
    "an unknown keyword": functools.partial(fp.linear_cpo_loss, betta=0.1),
}
Rows = list[tuple[dict[str, Any], type[Exception], str]]
# Entries that are no tensors are refused here, and by the loss what else is wrong with them.
BATCHES: Rows = [
    ({"labels": None}, TypeError, r"batch\['labels'\] must be a tensor; got None"),
    ({"labels": lambda y: y.tolist()}, TypeError, r"batch\['labels'\] must be a tensor; got \[\["),
    ({"labels": lambda y: y.float()}, TypeError, "labels must be an int64 .*; got a float32 tensor"),
    ({"labels": lambda y: y[0]}, ValueError, r"labels must be \(S, T\) = \(4, 9\); got .* \(9,\)"),
    ({"labels": lambda y: y[:3]}, ValueError, r"labels must be \(S, T\) = \(4, 9\); got .* \(3, 9\)"),
    ({"labels": lambda y: y.to("meta"), "desirable": None}, TypeError, r"batch\['desirable'\] must .*; got None"),
    ({"desirable": lambda d: d.long()}, TypeError, "desirable must be a bool .*; got an int64 tensor"),
    ({"ref_logps": 0.0}, TypeError, r"batch\['ref_logps'\] must be a tensor; got 0.0"),
    ({"ref_logps": lambda r: r[:3]}, ValueError, r"ref_logps must be \(S,\) = \(4,\); got .* \(3,\)"),
    ({"sample_weight": [1.0] * 4}, TypeError, r"sample_weight must be .*; got \[1.0"),
    ({"sequence_normalizer": -1}, ValueError, "sequence_normalizer must be .*; got -1"),
    ({"class_normalizer": (1, 1)}, ValueError, "class_normalizer needs .*; got reduction='mean'"),
    ({"cu_seqlens": [0, 36]}, TypeError, r"cu_seqlens must be .*; got \[0, 36\]"),
]
PREFERENCES: Rows = [
    ({"loss": None}, TypeError, "loss must be a linear loss.*; got None"),
    ({"tensors": torch.zeros(4, 5)}, TypeError, "tensors must be a tuple .*; got a float32 tensor"),
    ({"tensors": ()}, TypeError, r"tensors must be a tuple .*; got \(\)"),
    ({"tensors": (torch.zeros(2), [1])}, TypeError, r"tensors\[1\] must be a tensor; got \[1\]"),
    ({"keywords": [("beta", 0.1)]}, TypeError, "keywords must be a mapping .*; got"),
    ({"virtual_tokens": -1}, ValueError, "virtual_tokens must be an integer >= 0; got -1"),
]


def scored(**given: Any) -> Any:
    return models.preference_forward(MODEL, given, fp.LinearBCOLoss())


def test_batches() -> None:
    assert scored(**BATCH).loss.isfinite()
    wrong = [complaint(scored, changed(BATCH, changes), error, match) for changes, error, match in BATCHES]
    assert [text for text in wrong if text] == []


def test_preferences() -> None:
    given = {"loss": len, "tensors": (BATCH["labels"],), "keywords": {}}
    models.Preference(**given)
    wrong = [complaint(models.Preference, {**given, **changes}, error, match) for changes, error, match in PREFERENCES]
    assert [text for text in wrong if text] == []


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_what_is_no_linear_loss(loss: Any) -> None:
    arguments = {"model": MODEL, "batch": BATCH, "loss": loss}
    assert complaint(models.preference_forward, arguments, TypeError, "loss must be a linear loss.*; got ") == ""


def test_what_is_almost_a_linear_loss() -> None:
    arguments = {"model": MODEL, "batch": BATCH}
    for loss, match in (
        (fp.LinearCPOLoss, r"loss must be an object, made by LinearCPOLoss\(\.\.\.\), not its class; got <class"),
        (functools.partial(fp.linear_preference_loss, objective=len), r"loss must be fp\.LinearPreferenceLoss.*; got "),
        (fp.linear_preference_loss, r"loss must be fp\.LinearPreferenceLoss.*; got "),
    ):
        assert complaint(models.preference_forward, {**arguments, "loss": loss}, TypeError, match) == ""


@pytest.mark.parametrize("make", [fp.LinearCPOLoss, functools.partial(functools.partial, fp.linear_cpo_loss)])
def test_the_head_is_the_model_s(make: Callable[..., Any]) -> None:
    """Softcap, scale and bias of the loss are refused, unless they are those of the model."""
    for keywords, own in (
        ({"softcap": 5.0}, "None"),
        ({"logit_scale": 3.0}, "1.0"),
        ({"bias": torch.zeros(V)}, "None"),
    ):
        (name,) = keywords
        arguments = {"model": MODEL, "batch": batch(), "loss": make(**keywords)}
        match = f"{name} must be left to the model, whose own is {own}; got "
        assert complaint(models.preference_forward, arguments, ValueError, match) == ""
    capped = family("gemma2")
    plain = models.preference_forward(capped, batch(), fp.LinearCPOLoss()).loss
    same = models.preference_forward(capped, batch(), make(softcap=capped.config.final_logit_softcapping)).loss
    assert torch.equal(plain, same)


def test_misspelt_entries() -> None:
    for name, meant in (("sample_weights", "sample_weight"), ("token_weigth", "token_weight")):
        match = f"batch has {name}, which neither the loss nor the model takes: is it {meant}"
        assert complaint(scored, {**BATCH, name: torch.ones(4)}, ValueError, match) == ""
    assert scored(**BATCH, num_items_in_batch=torch.tensor(4)).loss.isfinite()


@pytest.mark.parametrize("given", [None, 3, "batch", [BATCH], (1, 2), torch.zeros(2)], ids=lambda x: type(x).__name__)
def test_what_is_no_batch(given: Any) -> None:
    arguments = {"model": MODEL, "batch": given, "loss": fp.LinearCPOLoss()}
    match = f"batch must be a mapping .*; got {type(given).__name__}"
    assert complaint(models.preference_forward, arguments, TypeError, match) == ""


@pytest.mark.parametrize(("given", "got"), [({}, "nothing"), ({1: 2}, "1"), ({"Labels": None}, "Labels")])
def test_missing_labels(given: Any, got: str) -> None:
    arguments = {"model": MODEL, "batch": given, "loss": fp.LinearCPOLoss()}
    assert complaint(models.preference_forward, arguments, ValueError, f"batch must have labels.*; got {got}") == ""


def test_missing_entries_are_named() -> None:
    match = "batch must have desirable, ref_logps, which the loss takes; got input_ids"
    assert complaint(scored, batch(), ValueError, match) == ""


@pytest.mark.parametrize("function", [models.attach, models.find_head, models.unwrap])
def test_what_is_no_model(function: Callable[..., Any]) -> None:
    others = (None, 3, "gpt2", [MODEL], {"model": MODEL}, type(MODEL), nn.Linear(2, 2), nn.Sequential(MODEL))
    for model in (*others, np.zeros(2), torch.zeros(2)):
        match = f"model must be a transformers model; got {type(model).__name__}"
        assert complaint(function, {"model": model}, TypeError, match) == ""
