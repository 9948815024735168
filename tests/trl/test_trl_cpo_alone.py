"""The CPO trainer where TRL has no ``trl.experimental.cpo``: the same numbers as with it."""

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from trl_models import DEFAULTS, TRAINING, llama, mixtral, pairs, t5, tokenizer
from trl_runs import assert_same_run

import fused_pref.trl
from fused_pref.trl import cpo
from fused_pref.trl.cpo_rows import tokenized_pair

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
MODULES = ("stock", "cpo_config", "cpo")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Our module once more, made where TRL's cannot be imported."""
    known = {name: importlib.import_module(f"fused_pref.trl.{name}") for name in MODULES}
    for name, module in known.items():
        monkeypatch.setattr(fused_pref.trl, name, module)
        monkeypatch.delitem(sys.modules, f"fused_pref.trl.{name}")
    monkeypatch.setitem(sys.modules, "trl.experimental.cpo", None)  # type: ignore[arg-type]
    return importlib.import_module("fused_pref.trl.cpo")


def made(module: Any, folder: Path, make: Any = llama, rows: Any = None, options: Any = None, **changes: Any) -> Any:
    steps = {"learning_rate": 0.05, "optim": "sgd", "max_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    args = module.StockCPOConfig(str(folder), **{**TRAINING, **steps, **sizes, **changes})
    set_seed(0)
    given = {"train_dataset": rows or pairs(), "eval_dataset": pairs(6), "processing_class": tokenizer()}
    return module.CPOTrainer(make(), args, **{**given, **(options or {})})


def trained(*given: Any, **changes: Any) -> Any:
    trainer = made(*given, **changes)
    trainer.start = copy.deepcopy(trainer.model)
    trainer.train()
    return trainer


def glued() -> Dataset:
    """The last word of a prompt is another token before a completion; one of them ends with EOS already."""
    return pairs().map(lambda row: {"prompt": row["prompt"].rstrip(), "chosen": row["chosen"] + " </s>"})


def talks() -> Dataset:
    question = {"role": "user", "content": "w1 w2"}
    answers = [{"role": "assistant", "content": text} for text in ("w3", "w4 w5", "w6")]
    rows = [{"chosen": [question, a], "rejected": [question, b]} for a in answers for b in answers if a is not b]
    return Dataset.from_list(rows * 2)


def rewards(result: Any) -> dict[str, float]:
    return {"seen": float(result.predictions.sum())}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "rows", "options", "changes"),
    [
        (llama, pairs, {}, {"cpo_alpha": 0.5, "label_smoothing": 0.1}),
        (llama, glued, {}, {"loss_type": "simpo", "simpo_gamma": 0.3, "max_length": 8}),
        (llama, talks, {"compute_metrics": rewards}, {"alpha": 0.2}),
        (mixtral, pairs, {}, {"loss_type": "alphapo", "alpha": 0.1, "gradient_checkpointing": True}),
        (llama, pairs, {"peft_config": LORA}, {**DEFAULTS, "max_length": None, "gradient_accumulation_steps": 2}),
    ],
    ids=["texts", "merged tokens", "conversations", "experts", "adapters in bf16"],
)
def test_run_is_that_with_trl_s_module(
    tmp_path: Path, alone: Any, make: Any, rows: Any, options: Any, changes: dict[str, Any]
) -> None:
    assert alone.StockCPOTrainer is not cpo.StockCPOTrainer
    assert alone.StockCPOTrainer.__module__ == "fused_pref.trl.plain_cpo"
    ours, theirs = (trained(module, tmp_path, make, rows(), options, **changes) for module in (alone, cpo))
    assert_same_run(ours, theirs, 1e-6)
    names = [f"{side}_{column}" for side in ("chosen", "rejected") for column in ("input_ids", "labels")]
    for name in (*names, "prompt_input_ids", "prompt_attention_mask"):
        assert list(ours.train_dataset[name]) == list(theirs.train_dataset[name]), name


@pytest.mark.slow
def test_fields_are_those_of_trl(alone: Any) -> None:
    """With their defaults."""
    ours, theirs = (module.StockCPOConfig.__dataclass_fields__ for module in (alone, cpo))
    assert ours.keys() == theirs.keys()
    for name, field in theirs.items():
        assert ours[name].default == field.default, name


def test_what_needs_trl_s_module(tmp_path: Path, alone: Any) -> None:
    needs = "need a TRL with trl.experimental.cpo, such as TRL 1.16"
    with pytest.raises(ValueError, match=f"encoder-decoder; encoder-decoders {needs}"):
        made(alone, tmp_path, t5)
    with pytest.raises(ValueError, match=f"generate_during_eval .* {needs}; got True"):
        made(alone, tmp_path, generate_during_eval=True)
    alone.CPOTrainer = type("Own", (alone.CPOTrainer,), {"cpo_loss": lambda self, *logps: logps})
    with pytest.raises(ValueError, match=r"cpo_loss is overridden, which is a step of trl\.experimental\.cpo"):
        made(alone, tmp_path)
    assert list(tmp_path.iterdir()) == []


class Lookup:
    """Token ids of texts, by a dictionary."""

    bos_token_id, eos_token_id = None, 0

    def __init__(self, **texts: list[int]) -> None:
        self.texts = texts

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": self.texts[text]}


def test_tokens_of_a_prompt() -> None:
    """Its last one may be another with a completion behind it."""
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    pair = tokenized_pair(row, Lookup(a=[5, 6], ab=[5, 7], ac=[5, 6, 8, 0]), 3)
    assert pair["chosen_labels"] == [-100, 7, 0]
    assert pair["rejected_labels"] == [-100, -100, 8]
    assert pair["prompt_input_ids"] == [5]
    with pytest.raises(ValueError, match="a prompt must have no more tokens than with its chosen text; got 'a'"):
        tokenized_pair(row, Lookup(a=[5, 6], ab=[5], ac=[5, 6, 8]), 3)
    with pytest.raises(ValueError, match="a prompt must have the same tokens in both sequences, but for one; got 'a'"):
        tokenized_pair(row, Lookup(a=[5, 6, 7], ab=[1, 2, 3], ac=[5, 6, 7, 8]), 3)
