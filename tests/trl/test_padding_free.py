"""A batch as one row without padding: the numbers of the padded one, by every trainer."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, Lfm2Config, Lfm2ForCausalLM
from trl_models import TRAINING, llama, pairs, sharp, sizes, tokenizer, unpaired

from fused_pref import trl

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
TRAINERS = ("CPO", "DPO", "KTO", "BCO")
STEPS = {"max_steps": 2, "learning_rate": 0.05, "optim": "sgd", "beta": 0.4, "per_device_train_batch_size": 4}
# They count the padding, as TRL's CPO takes means of logits over it.
OF_PADDING = ("total_flos", "logits/chosen", "logits/rejected")


def trained(
    name: str, folder: Path, *, attention: str = "sdpa", seen: list[Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """Logged numbers and parameters of a run; the model's inputs are added to ``seen``."""
    model = llama(attn_implementation=attention)
    if seen is not None:
        model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    reference = {} if name == "CPO" else {"ref_model": sharp()}
    data = pairs if name in ("CPO", "DPO") else unpaired
    config: Any = getattr(trl, f"{name}Config")
    trainer = getattr(trl, f"{name}Trainer")(
        model=model,
        **reference,
        args=config(str(folder), **{**TRAINING, **STEPS, **changes}),
        train_dataset=data(13),
        eval_dataset=data(5),
        processing_class=tokenizer(),
    )
    trainer.train()
    assert trainer.args.padding_free == changes.get("padding_free", False)
    parameters = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return {"log": [*trainer.state.log_history, trainer.evaluate()], "parameters": parameters}


def assert_same(packed: dict[str, Any], padded: dict[str, Any], name: str) -> None:
    torch.testing.assert_close(packed["parameters"], padded["parameters"], rtol=1e-4, atol=1e-5)
    for mine, other in zip(packed["log"], padded["log"], strict=True):
        assert mine.keys() == other.keys()
        for key, value in other.items():
            number = key.removeprefix("eval_")
            of_padding = number in OF_PADDING if name == "CPO" else number == "total_flos"
            if "runtime" not in key and "per_second" not in key and not of_padding:
                assert mine[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The run of a trainer on padded rows, made once."""
    return functools.cache(lambda name, attention: trained(name, tmp_path_factory.mktemp(name), attention=attention))


# What attention is given does not depend on the trainer.
@pytest.mark.parametrize(("name", "attention"), [*((name, "sdpa") for name in TRAINERS), ("DPO", "eager")])
def test_numbers_are_those_of_padded_rows(name: str, attention: str, padded: Any, tmp_path: Path) -> None:
    seen: list[Any] = []
    packed = trained(name, tmp_path, attention=attention, padding_free=True, seen=seen)
    assert_same(packed, padded(name, attention), name)
    rows = [inputs for inputs in seen if inputs.get("preference") is not None]
    assert rows
    for inputs in rows:
        assert inputs.get("attention_mask") is None
        assert inputs["input_ids"].shape == inputs["position_ids"].shape
        assert len(inputs["input_ids"]) == 1


@pytest.mark.parametrize("name", TRAINERS)
def test_rows_of_some_tokens(name: str, padded: Any, tmp_path: Path) -> None:
    """Sequences wherever they fit, in rows that are fewer than they are."""
    seen: list[Any] = []
    packed = trained(name, tmp_path, padding_free=True, padding_free_tokens=40, seen=seen)
    assert_same(packed, padded(name, "sdpa"), name)
    shapes = [inputs["input_ids"].shape for inputs in seen if inputs.get("preference") is not None]
    assert shapes
    assert all(width <= 40 for _, width in shapes)
    assert any(1 < rows <= 5 for rows, _ in shapes)


MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "token weights in rows": ("DPO", {"ld_alpha": 0.5, "padding_free_tokens": 30}),
    "weights and sft": ("DPO", {"ld_alpha": 0.5, "use_weighting": True, "loss_type": ["sigmoid", "sft"]}),
    "precomputed references": ("DPO", {"precompute_ref_log_probs": True}),
    "no reference of its own": ("KTO", {"precompute_ref_log_probs": True}),
    "exact accumulation": ("DPO", {"exact_accumulation": True, "gradient_accumulation_steps": 2}),
    "a moving shift": ("BCO", {"delta_kind": "ema", "gradient_accumulation_steps": 2}),
    "checkpointing": ("KTO", {"gradient_checkpointing": True}),
}


@pytest.mark.parametrize("kind", MORE)
def test_options(kind: str, tmp_path: Path) -> None:
    name, changes = MORE[kind]
    padded = {key: value for key, value in changes.items() if key != "padding_free_tokens"}
    assert_same(trained(name, tmp_path, padding_free=True, **changes), trained(name, tmp_path, **padded), name)


def test_defaults(tmp_path: Path) -> None:
    """In bf16, which rounds rows of one shape as those of another about alike."""
    packed, padded = (trained("DPO", tmp_path, bf16=True, padding_free=free) for free in (True, False))
    losses = [[entry["loss"] for entry in run["log"] if "loss" in entry] for run in (packed, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


# Convolutions run over a row, whatever the positions; ALiBi counts from its start.
MIXING = {
    "a sequence see those before it": lambda: Lfm2ForCausalLM(
        Lfm2Config(**sizes(layer_types=["conv", "full_attention"]))
    ),
    "which BloomForCausalLM does not": lambda: BloomForCausalLM(BloomConfig(vocab_size=66, hidden_size=32, n_head=4)),
}


@pytest.mark.parametrize("message", MIXING)
def test_refused(message: str, tmp_path: Path) -> None:
    """A model that lets sequences see each other, before training, with nothing written."""
    args = trl.DPOConfig(str(tmp_path / "out"), **{**TRAINING, "padding_free": True})
    given: dict[str, Any] = {"train_dataset": pairs(), "processing_class": tokenizer(), "ref_model": llama()}
    with pytest.raises(ValueError, match=f"padding_free=True .*{message}"):
        trl.DPOTrainer(model=MIXING[message](), args=args, **given)
    assert not (tmp_path / "out").exists()
    with pytest.raises(TypeError, match="padding_free must be True or False"):
        trl.CPOConfig(str(tmp_path), **{**TRAINING, "padding_free": 1})
