"""What the trainers and their configurations refuse: options of their own and arguments, and nothing is written."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from malformed import complaint
from torch import Tensor, nn
from trl.trainer.dpo_config import DPOConfig as StockDPOConfig
from trl.trainer.kto_config import KTOConfig as StockKTOConfig
from trl_models import TRAINING, llama, pairs, tokenizer, unpaired

import fused_pref as fp
from fused_pref.trl import (
    BCOConfig,
    BCOTrainer,
    CPOConfig,
    CPOTrainer,
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
)
from fused_pref.trl.stock import StockCPOConfig
from fused_pref.trl.udm import PromptWeights

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
NAN, INF = float("nan"), float("inf")
MODEL = llama()
OPTIONS = {**TRAINING, "output_dir": "nowhere", "max_steps": 1}
Rows = list[tuple[dict[str, Any], type[Exception], str]]

BOTH: Rows = [
    ({"memory_budget": 0}, ValueError, "memory_budget must be an integer >= 1, or None; got 0"),
    ({"exact_accumulation": 1}, TypeError, "exact_accumulation must be True or False; got 1"),
    ({"padding_free": 1}, TypeError, "padding_free must be True or False; got 1"),
    ({"padding_free_tokens": 64}, ValueError, "padding_free_tokens needs padding_free=True; got 64"),
    (
        {"padding_free": True, "padding_free_tokens": 0},
        ValueError,
        "padding_free_tokens must be .* >= 1, or None; got 0",
    ),
    ({"betta": 0.1}, TypeError, "unexpected keyword argument 'betta'"),
]
OF_FILE: Rows = [
    ({"ref_logps_file": 3}, TypeError, "ref_logps_file must be the name of a file, or None; got 3"),
    ({"ref_logps_any_model": "yes"}, TypeError, "ref_logps_any_model must be True or False; got 'yes'"),
    ({"ref_logps_any_model": True}, ValueError, "ref_logps_any_model needs ref_logps_file; got None"),
    (
        {"ref_logps_file": "x", "sync_ref_model": True},
        ValueError,
        "ref_logps_file needs a reference that stays as it is; got sync_ref_model=True",
    ),
]
OF_SHIFT: Rows = [
    ({"delta_kind": "EMA"}, ValueError, "delta_kind must be one of .*; got 'EMA'"),
    ({"delta_decay": 1}, ValueError, r"delta_decay must be a number in \[0, 1\); got 1"),
    ({"delta_value": INF}, ValueError, "delta_value must be a finite number; got inf"),
    ({"delta_update": "epoch"}, ValueError, "delta_update must be one of .*; got 'epoch'"),
]
OF_BCO: Rows = [
    *OF_SHIFT,
    ({"prompt_sample_size": 0}, ValueError, "prompt_sample_size must be an integer >= 1; got 0"),
    ({"min_density_ratio": -1.0}, ValueError, "min_density_ratio must be a finite number > 0; got -1.0"),
    ({"min_density_ratio": 20.0}, ValueError, "max_density_ratio must be >= min_density_ratio = 20.0; got 10.0"),
    ({"max_density_ratio": INF}, ValueError, "max_density_ratio must be .*; got inf"),
    ({"desirable_weight": -1.0}, ValueError, "desirable_weight must be a finite number >= 0; got -1.0"),
    ({"desirable_weight": "1"}, TypeError, "desirable_weight must be .*; got '1'"),
    ({"undesirable_weight": NAN}, ValueError, "undesirable_weight must be a finite number; got nan"),
    ({"beta": 0.0}, ValueError, "beta must be a finite number > 0; got 0.0"),
    ({"loss_type": "kto"}, ValueError, "loss_type must stay 'apo_zero_unpaired': .*; got 'kto'"),
    ({"train_sampling_strategy": "group_by_length"}, ValueError, "train_sampling_strategy must be one of .*; got 'g"),
]
# Of TRL's configuration the trainer checks what the loss takes.
OF_CPO: Rows = [
    ({"beta": 0.0}, ValueError, "beta must be a finite number > 0; got 0.0"),
    ({"loss_type": "xyz"}, ValueError, "loss_type must be one of .*; got 'xyz'"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be a number in \[0, 1\); got 1.5"),
    ({"cpo_alpha": NAN}, ValueError, "cpo_alpha must be a finite number >= 0; got nan"),
    ({"simpo_gamma": INF}, ValueError, "simpo_gamma must be a finite number; got inf"),
    ({"alpha": INF}, ValueError, "alpha must be a finite number; got inf"),
    ({"max_length": 0}, ValueError, "max_length must be an integer >= 1, or None; got 0"),
]
OF_KTO: Rows = [
    ({"loss_type": "xyz"}, ValueError, "loss_type must be one of .*; got 'xyz'"),
    ({"max_length": 0}, ValueError, "max_length must be an integer >= 1, or None; got 0"),
]
# Others take TRL's own path.
OF_DPO: Rows = [
    ({"loss_type": "xyz"}, ValueError, "loss_type must be one of .*; got 'xyz'"),
    ({"loss_type": ["hinge", "dpo"]}, ValueError, "loss_type must be one of .*; got 'dpo'"),
    ({"loss_type": "exo_pair"}, ValueError, "Label smoothing must be greater than 0.0"),
    ({"max_length": 0}, ValueError, "max_length must be an integer >= 1, or None; got 0"),
]
TRAINERS: Rows = [
    ({"model": None}, TypeError, "model must be a transformers model, or the name of one; got NoneType"),
    ({"model": type(MODEL)}, TypeError, "model must be a transformers model.*; got type"),
    ({"args": {}}, TypeError, r"args must be a \w+Config; got dict"),
    ({"train_dataset": "rows"}, TypeError, "train_dataset must be a datasets.Dataset.*; got str"),
    ({"eval_dataset": [1]}, TypeError, "eval_dataset must be a datasets.Dataset.*; got list"),
    ({"processing_class": "gpt2"}, TypeError, "processing_class must be a tokenizer, not its name; got 'gpt2'"),
    ({"processing_class": object()}, TypeError, "processing_class must be a tokenizer of transformers; got a object"),
    ({"peft_config": "lora"}, TypeError, "peft_config.* must be .*, got str"),
    ({"optimizer": "adam"}, TypeError, "unexpected keyword argument 'optimizer'"),
]
OF_REFERENCE: Rows = [
    ({"ref_model": "gpt2"}, TypeError, "ref_model is of no use: model must be a transformers model; got str"),
    ({"ref_model": nn.Linear(2, 2)}, TypeError, "ref_model is of no use: .*; got Linear"),
    ({"ref_model": MODEL.model}, ValueError, "ref_model is of no use: model must have output embeddings.* has none"),
    ({"eval_dataset": {"a": 3}}, TypeError, r"eval_dataset\['a'\] must be a datasets.Dataset.*; got int"),
]
OF_BCO_TRAINER: Rows = [
    ({"embedding_tokenizer": tokenizer()}, ValueError, "embedding_tokenizer needs embedding_func; got None"),
    ({"embedding_func": len, "embedding_tokenizer": 3}, TypeError, "embedding_tokenizer must be .*; got 3"),
    ({"embedding_func": "bert"}, TypeError, "embedding_func must be a function .*; got 'bert'"),
]


def trainer(config: type, rows: Any, **options: Any) -> dict[str, Any]:
    given = {**OPTIONS, **options}
    return {"model": MODEL, "args": config(**given), "train_dataset": rows, "processing_class": tokenizer()}


def configured(**options: Any) -> None:
    CPOTrainer(**trainer(StockCPOConfig, pairs(4), **options))


def of_kto(**options: Any) -> None:
    KTOTrainer(**trainer(StockKTOConfig, unpaired(4), **options))


def of_dpo(**options: Any) -> None:
    DPOTrainer(**trainer(StockDPOConfig, pairs(4), **options), ref_model=llama(seed=3))


# Arguments are made in the test, because configurations warn.
TABLES: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]], Rows]] = {
    "CPOConfig": (CPOConfig, lambda: OPTIONS, BOTH),
    "BCOConfig": (BCOConfig, lambda: OPTIONS, BOTH + OF_FILE + OF_BCO),
    "CPOTrainer with TRL's configuration": (configured, dict, OF_CPO),
    "CPOTrainer": (CPOTrainer, lambda: trainer(StockCPOConfig, pairs(4)), TRAINERS + BOTH[:2]),
    "KTOConfig": (KTOConfig, lambda: OPTIONS, BOTH + OF_FILE),
    "KTOTrainer with TRL's configuration": (of_kto, dict, OF_KTO),
    "KTOTrainer": (
        KTOTrainer,
        lambda: trainer(StockKTOConfig, unpaired(4)),
        [*TRAINERS, *OF_REFERENCE, *BOTH[:2], ({"objective": 3}, TypeError, "objective must be a function .*; got 3")],
    ),
    "DPOConfig": (DPOConfig, lambda: OPTIONS, BOTH + OF_FILE + OF_SHIFT),
    "DPOTrainer with TRL's configuration": (of_dpo, dict, OF_DPO),
    "DPOTrainer": (
        DPOTrainer,
        lambda: {**trainer(StockDPOConfig, pairs(4)), "ref_model": llama(seed=3)},
        TRAINERS + OF_REFERENCE,
    ),
    "BCOTrainer": (BCOTrainer, lambda: trainer(BCOConfig, unpaired(4)), TRAINERS + OF_REFERENCE + OF_BCO_TRAINER),
}


@pytest.mark.parametrize("name", TABLES)
def test_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    function, make, rows = TABLES[name]
    arguments = make()
    function(**arguments)
    for path in tmp_path.iterdir():
        path.rmdir()
    wrong = [complaint(function, {**arguments, **changes}, error, match) for changes, error, match in rows]
    assert [text for text in wrong if text] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "stock", "rows"),
    [
        (CPOConfig, StockCPOConfig, BOTH),
        (BCOConfig, StockKTOConfig, BOTH + OF_FILE + OF_BCO),
        (KTOConfig, StockKTOConfig, BOTH + OF_FILE),
        (DPOConfig, StockDPOConfig, BOTH + OF_FILE + OF_SHIFT),
    ],
)
def test_every_option_is_looked_at(config: Any, stock: Any, rows: Rows) -> None:
    """Those that TRL's configuration has not; of its own, TRL's and the trainers see to what they take."""
    own = {field.name for field in dataclasses.fields(config)} - {field.name for field in dataclasses.fields(stock)}
    assert own <= {name for changes, _, _ in rows for name in changes}


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


@pytest.mark.parametrize(("trainer", "option"), [(DPOTrainer, "memory_budget"), (KTOTrainer, "padding_free")])
def test_an_option_of_the_configuration_is_none_of_the_trainer(trainer: Any, option: str) -> None:
    config = f"fused_pref.trl.{trainer.__name__.removesuffix('Trainer')}Config"
    with pytest.raises(TypeError, match=rf"{trainer.__name__}\(\) got an unexpected .*; {option} of {config} is meant"):
        trainer(MODEL, **{option: 1})
    with pytest.raises(TypeError, match=rf"{trainer.__name__}\(\) got an unexpected keyword argument 'betta'$"):
        trainer(MODEL, betta=1)
