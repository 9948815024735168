"""Malformed use of the head inside of models, and of the trainers with their configurations."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import batch
from malformed import changed, complaint
from torch import Tensor, nn
from trl_models import TRAINING, llama, pairs, tokenizer, unpaired

import fused_pref as fp
from fused_pref.models import preference as models
from fused_pref.trl import BCOConfig, BCOTrainer, CPOConfig, CPOTrainer
from fused_pref.trl.udm import PromptWeights

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
NAN, INF = float("nan"), float("inf")
MODEL = llama()
OPTIONS = {**TRAINING, "output_dir": "nowhere", "max_steps": 1}
Rows = list[tuple[dict[str, Any], type[Exception], str]]

BATCH = {**batch(), "desirable": torch.tensor([True, False, True, False]), "ref_logps": torch.zeros(4)}
LOSSES: dict[str, Any] = {
    "none": None,
    "a name": "cpo",
    "a number": 3,
    "a builtin": int,
    "a class": fp.LinearCPOLoss,
    "a loss of logits": fp.BCOLoss(),
    "a layer": nn.Linear(2, 2),
    "a layer in layers": nn.Sequential(nn.Linear(2, 2)),
    "a partial loss of logits": functools.partial(fp.cpo_loss, beta=0.1),
    "an unknown keyword": functools.partial(fp.linear_cpo_loss, betta=0.1),
}
BATCHES: Rows = [
    ({"labels": None}, TypeError, r"batch\['labels'\] must be a tensor; got None"),
    ({"labels": lambda y: y.tolist()}, TypeError, r"batch\['labels'\] must be a tensor; got \[\["),
    ({"labels": lambda y: y.numpy()}, TypeError, r"batch\['labels'\] must be a tensor; got array"),
    ({"labels": lambda y: y.float()}, TypeError, "labels must be a int64 .*; got a float32 tensor"),
    ({"labels": lambda y: y[0]}, ValueError, r"labels must be \(S, T\) = \(4, 9\); got .* \(9,\)"),
    ({"labels": lambda y: y.sum()}, ValueError, r"labels must be \(S, T\) = \(4, 9\); got .* \(\)"),
    ({"labels": lambda y: y[:3]}, ValueError, r"labels must be \(S, T\) = \(4, 9\); got .* \(3, 9\)"),
    ({"labels": lambda y: y.to("meta"), "desirable": None}, TypeError, r"batch\['desirable'\] must .*; got None"),
    ({"desirable": [True] * 4}, TypeError, r"batch\['desirable'\] must be a tensor; got \[True"),
    ({"desirable": lambda d: d.long()}, TypeError, "desirable must be a bool .*; got a int64 tensor"),
    ({"ref_logps": 0.0}, TypeError, r"batch\['ref_logps'\] must be a tensor; got 0.0"),
    ({"ref_logps": lambda r: r[:3]}, ValueError, r"ref_logps must be \(S,\) = \(4,\); got .* \(3,\)"),
    ({"sample_weight": [1.0] * 4}, TypeError, r"sample_weight must be .*; got \[1.0"),
    ({"sequence_normalizer": -1}, ValueError, "sequence_normalizer must be .*; got -1"),
    ({"class_normalizer": (1, 1)}, ValueError, "class_normalizer needs .*; got reduction='mean'"),
    ({"cu_seqlens": [0, 36]}, TypeError, r"cu_seqlens must be .*; got \[0, 36\]"),
]
PREFERENCES: Rows = [
    ({"loss": None}, TypeError, "loss must be a linear loss.*; got None"),
    ({"loss": "cpo"}, TypeError, "loss must be a linear loss.*; got 'cpo'"),
    ({"tensors": torch.zeros(4, 5)}, TypeError, "tensors must be a tuple .*; got a float32 tensor"),
    ({"tensors": ()}, TypeError, r"tensors must be a tuple .*; got \(\)"),
    ({"tensors": None}, TypeError, "tensors must be a tuple .*; got None"),
    ({"tensors": (torch.zeros(2), [1])}, TypeError, r"tensors\[1\] must be a tensor; got \[1\]"),
    ({"keywords": None}, TypeError, "keywords must be a mapping .*; got None"),
    ({"keywords": [("beta", 0.1)]}, TypeError, "keywords must be a mapping .*; got"),
    ({"virtual_tokens": -1}, ValueError, "virtual_tokens must be an integer >= 0; got -1"),
    ({"virtual_tokens": 1.5}, TypeError, "virtual_tokens must be an integer; got 1.5"),
    ({"virtual_tokens": True}, TypeError, "virtual_tokens must be an integer; got True"),
]
BOTH: Rows = [
    ({"memory_budget": 0}, ValueError, "memory_budget must be an integer >= 1, or None; got 0"),
    ({"memory_budget": "1GB"}, TypeError, "memory_budget must be an integer; got '1GB'"),
    ({"memory_budget": True}, TypeError, "memory_budget must be an integer; got True"),
    ({"memory_budget": 2.0**30}, TypeError, "memory_budget must be an integer; got 1073741824.0"),
    ({"exact_accumulation": 1}, TypeError, "exact_accumulation must be True or False; got 1"),
    ({"exact_accumulation": None}, TypeError, "exact_accumulation must be True or False; got None"),
    ({"betta": 0.1}, TypeError, "unexpected keyword argument 'betta'"),
]
OF_BCO: Rows = [
    ({"delta_kind": "EMA"}, ValueError, "delta_kind must be one of .*; got 'EMA'"),
    ({"delta_kind": None}, ValueError, "delta_kind must be one of .*; got None"),
    ({"delta_decay": 1}, ValueError, r"delta_decay must be a number in \[0, 1\); got 1"),
    ({"delta_decay": "0.9"}, TypeError, r"delta_decay must be a number in \[0, 1\); got '0.9'"),
    ({"delta_value": True}, TypeError, "delta_value must be a finite number; got True"),
    ({"delta_value": INF}, ValueError, "delta_value must be a finite number; got inf"),
    ({"delta_update": "Step"}, ValueError, "delta_update must be one of .*; got 'Step'"),
    ({"delta_update": True}, TypeError, "delta_update must be one of .*; got True"),
    ({"prompt_sample_size": 1.5}, TypeError, "prompt_sample_size must be an integer; got 1.5"),
    ({"prompt_sample_size": True}, TypeError, "prompt_sample_size must be an integer; got True"),
    ({"min_density_ratio": "0.5"}, TypeError, "min_density_ratio must be .*; got '0.5'"),
    ({"min_density_ratio": 20.0}, ValueError, "max_density_ratio must be >= min_density_ratio = 20.0; got 10.0"),
    ({"max_density_ratio": INF}, ValueError, "max_density_ratio must be .*; got inf"),
    ({"desirable_weight": "1"}, TypeError, "desirable_weight must be .*; got '1'"),
    ({"undesirable_weight": -1}, ValueError, "undesirable_weight must be .*; got -1"),
    ({"beta": None}, TypeError, "beta must be .*; got None"),
    ({"beta": NAN}, ValueError, "beta must be .*; got nan"),
    ({"loss_type": None}, ValueError, "loss_type must stay .*; got None"),
    ({"train_sampling_strategy": None}, ValueError, "train_sampling_strategy must be one of .*; got None"),
]
TRAINERS: Rows = [
    ({"model": None}, TypeError, "model must be a transformers model.*; got NoneType"),
    ({"model": type(MODEL)}, TypeError, "model must be a transformers model.*; got type"),
    ({"model": [MODEL]}, TypeError, "model must be a transformers model.*; got list"),
    ({"args": {}}, TypeError, r"args must be a \w+Config; got dict"),
    ({"args": "out"}, TypeError, r"args must be a \w+Config; got str"),
    ({"train_dataset": "rows"}, TypeError, "train_dataset must be a datasets.Dataset.*; got str"),
    ({"eval_dataset": [1]}, TypeError, "eval_dataset must be a datasets.Dataset.*; got list"),
    ({"processing_class": "gpt2"}, TypeError, "processing_class must be a tokenizer, not its name; got 'gpt2'"),
    ({"processing_class": object()}, TypeError, "processing_class must be a tokenizer of transformers; got a object"),
    ({"peft_config": "lora"}, TypeError, "peft_config.* must be .*, got str"),
    ({"optimizer": "adam"}, TypeError, "unexpected keyword argument 'optimizer'"),
]
OF_BCO_TRAINER: Rows = [
    ({"ref_model": 3}, TypeError, "ref_model is of no use: model must be a transformers model; got int"),
    ({"ref_model": "gpt2"}, TypeError, "ref_model is of no use: model must be a transformers model; got str"),
    ({"ref_model": nn.Linear(2, 2)}, TypeError, "ref_model is of no use: .*; got Linear"),
    ({"ref_model": MODEL.model}, ValueError, "ref_model is of no use: model must have output embeddings.* has none"),
    ({"embedding_tokenizer": tokenizer()}, ValueError, "embedding_tokenizer needs embedding_func; got None"),
    ({"embedding_func": len, "embedding_tokenizer": 3}, TypeError, "embedding_tokenizer must be .*; got 3"),
    ({"embedding_func": "bert"}, TypeError, "embedding_func must be a function .*; got 'bert'"),
    ({"eval_dataset": {"a": 3}}, TypeError, r"eval_dataset\['a'\] must be a datasets.Dataset.*; got int"),
]


def trainer(config: type, rows: Any) -> dict[str, Any]:
    return {"model": MODEL, "args": config(**OPTIONS), "train_dataset": rows, "processing_class": tokenizer()}


# Arguments are made in the test, because configurations warn.
TABLES: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]], Rows]] = {
    "Preference": (
        models.Preference,
        lambda: {"loss": len, "tensors": (BATCH["labels"],), "keywords": {}},
        PREFERENCES,
    ),
    "CPOConfig": (CPOConfig, lambda: OPTIONS, BOTH),
    "BCOConfig": (BCOConfig, lambda: OPTIONS, BOTH + OF_BCO),
    "CPOTrainer": (CPOTrainer, lambda: trainer(CPOConfig, pairs(4)), TRAINERS + BOTH[:5]),
    "BCOTrainer": (BCOTrainer, lambda: trainer(BCOConfig, unpaired(4)), TRAINERS + OF_BCO_TRAINER),
}


def scored(**given: Any) -> Any:
    return models.preference_forward(MODEL, given, fp.LinearBCOLoss())


@pytest.mark.parametrize("name", TABLES)
def test_the_unchanged_call_is_valid(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    function, arguments, _ = TABLES[name]
    function(**arguments())


def test_the_unchanged_batch_is_valid() -> None:
    assert scored(**BATCH).loss.isfinite()


@pytest.mark.parametrize(("changes", "error", "match"), BATCHES)
def test_batches(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    assert complaint(scored, changed(BATCH, changes), error, match) == ""


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses(loss: Any) -> None:
    arguments = {"model": MODEL, "batch": BATCH, "loss": loss}
    assert complaint(models.preference_forward, arguments, TypeError, "loss must be a linear loss.*; got ") == ""


@pytest.mark.parametrize("given", [None, 3, "batch", [BATCH], (1, 2), torch.zeros(2)])
def test_what_is_no_batch(given: Any) -> None:
    arguments = {"model": MODEL, "batch": given, "loss": fp.LinearCPOLoss()}
    match = f"batch must be a mapping .*; got {type(given).__name__}"
    assert complaint(models.preference_forward, arguments, TypeError, match) == ""


@pytest.mark.parametrize(("given", "got"), [({}, "nothing"), ({1: 2}, "1"), ({"Labels": None}, "Labels")])
def test_missing_labels(given: Any, got: str) -> None:
    arguments = {"model": MODEL, "batch": given, "loss": fp.LinearCPOLoss()}
    assert complaint(models.preference_forward, arguments, ValueError, f"batch must have labels.*; got {got}") == ""


@pytest.mark.parametrize("function", [models.attach, models.find_head, models.unwrap])
def test_what_is_no_model(function: Callable[..., Any]) -> None:
    for model in (3, [MODEL], {"model": MODEL}, type(MODEL), nn.Sequential(MODEL), np.zeros(2), torch.zeros(2)):
        match = f"model must be a transformers model; got {type(model).__name__}"
        assert complaint(function, {"model": model}, TypeError, match) == ""


@pytest.mark.parametrize(
    ("name", "changes", "error", "match"), [(name, *row) for name, (_, _, rows) in TABLES.items() for row in rows]
)
def test_refused(
    name: str,
    changes: dict[str, Any],
    error: type[Exception],
    match: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    function, arguments, _ = TABLES[name]
    assert complaint(function, {**arguments(), **changes}, error, match) == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("embed", "match"),
    [
        (lambda texts: [1.0] * len(texts), r"embedding_func must be .* \(2, E\) for 2 prompts; got \[1.0, 1.0\]"),
        (lambda texts: None, "embedding_func must be .*; got None"),
        (lambda texts: torch.ones(len(texts)), r"embedding_func must be .*; got a float32 tensor of shape \(2,\)"),
        (lambda texts: torch.ones(len(texts) + 1, 3), r"embedding_func must be .*; got .* \(3, 3\)"),
        (lambda texts: torch.ones(len(texts), 2 + len(texts)), r"embedding_func must be .* E is the same, 4.*\(1, 3\)"),
    ],
)
def test_embeddings(embed: Callable[[list[str]], Tensor], match: str) -> None:
    ratio = fp.DensityRatio()
    weights = PromptWeights(embed, None, ratio, batch_size=2, device=torch.device("cpu"))
    given = {"prompts": ["a", "b", "c"], "desirable": [True, False, False], "sample_size": 2, "seed": 0}
    assert complaint(weights.fit, given, ValueError, match) == ""
