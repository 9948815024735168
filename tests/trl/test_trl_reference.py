"""BCO's references are evaluated without noise, and models get all that a collator gives for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel, set_seed
from trl import KTOConfig
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer
from trl_models import SETUPS, llama, llava, llava_processor, tokenizer, unpaired

from fused_pref.trl import BCOConfig, BCOTrainer
from fused_pref.trl.base import evaluating

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
STEP = {"max_steps": 1, "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}


def made(folder: Path, model: Any, setup: str = "fp32", options: dict[str, Any] | None = None, **changes: Any) -> Any:
    set_seed(0)
    given = {"train_dataset": unpaired(), "processing_class": tokenizer(), **(options or {})}
    args = BCOConfig(str(folder), **{**SETUPS[setup], **STEP, "learning_rate": 0.1, **changes})
    return BCOTrainer(model=model, args=args, **given)


def noisy(**changes: Any) -> Any:
    """Dropout in attention, which `disable_dropout` does not find."""
    return llama(attention_dropout=0.5, **changes)


def adapted(seed: int = 1) -> Any:
    """A model whose adapter does something."""
    model = get_peft_model(noisy(), LORA)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


# Name → (model, options of the trainer, changes of its configuration, the model that is the reference)
REFERENCES: dict[str, tuple[Any, dict[str, Any], dict[str, Any], Any]] = {
    "a deep copy": (noisy, {}, {}, llama),
    "a model given": (noisy, {"ref_model": lambda: noisy(seed=3)}, {}, lambda: llama(seed=3)),
    "precomputed": (noisy, {}, {"precompute_ref_log_probs": True}, llama),
    "the model without its adapter": (noisy, {"peft_config": lambda: LORA}, {}, llama),
    "a copy of an adapter": (adapted, {}, {}, adapted),
    "precomputed of an adapter": (adapted, {}, {"precompute_ref_log_probs": True}, adapted),
}


# In bfloat16, a model of each kind.
IN_BFLOAT16 = ("a deep copy", "precomputed of an adapter")


@pytest.mark.parametrize(
    ("name", "setup"), [*((name, "fp32") for name in REFERENCES), *((name, "defaults") for name in IN_BFLOAT16)]
)
def test_the_reference_has_no_noise(tmp_path: Path, name: str, setup: str) -> None:
    """With NEFTune's noise in the embeddings, and dropout in attention and adapters; the policy trains with them."""
    make, given, changes, reference = REFERENCES[name]
    options = {key: value() for key, value in given.items()}
    noise = {"neftune_noise_alpha": 50.0, "disable_dropout": False, "max_steps": 2}
    trainer = made(tmp_path, make().train(), setup, options, **noise, **changes)
    seen: list[torch.Tensor] = []
    modes: list[bool] = []
    policy: list[torch.Tensor] = []
    run = trainer._preference

    def preference(loss: Any, model: Any, batch: Any, *tensors: Any, **given: Any) -> Any:
        if len(tensors) == 2:
            seen.append(torch.cat([tensors[1][:, None], _eager(trainer, reference(), batch)[:, None]], 1))
            modes.append(trainer.model.training and all(module.training for module in trainer.model.modules()))
        return run(loss, model, batch, *tensors, **given)

    keep = trainer._keep
    trainer._keep = lambda output, *rest: (policy.append(output.logps), keep(output, *rest))
    trainer._preference = preference
    trainer.train()
    got, want = torch.cat(seen).double().unbind(1)
    assert len(got) == 8
    # bfloat16 has 8 bits, and the log-probs are sums of up to 6.
    close = 2e-2 if setup == "defaults" else 1e-5
    torch.testing.assert_close(got, want, rtol=close, atol=close)
    assert modes == [True] * 2
    assert (policy[0] - want[:4]).abs().max() > 0.2


@torch.no_grad()
def _eager(trainer: Any, model: Any, batch: dict[str, Any]) -> torch.Tensor:
    logits = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    token = logits.gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (token * batch["completion_mask"][:, 1:]).sum(1)


@pytest.mark.parametrize("setup", SETUPS)
def test_reference_log_probs_are_the_same_each_time(tmp_path: Path, setup: str) -> None:
    trainer = made(tmp_path, adapted().train(), setup, disable_dropout=False)
    trainer.model.base_model.model.model.layers[0].eval()  # a part that a user keeps in evaluation
    batch = next(iter(trainer.get_train_dataloader()))
    before = {module: module.training for module in trainer.model.modules()}
    first, again = (trainer.compute_ref_log_probs(trainer.model, batch)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert {module: module.training for module in trainer.model.modules()} == before
    assert not all(before.values())
    assert any(before.values())
    trainer.model.get_output_embeddings().register_forward_pre_hook(_fail)
    with pytest.raises(KeyError, match="in the forward"):
        trainer.compute_ref_log_probs(trainer.model, batch)
    assert {module: module.training for module in trainer.model.modules()} == before


def _fail(*given: Any) -> None:
    raise KeyError("in the forward")


def test_modes_are_put_back() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()).eval())
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False, False]


# What the model is given.


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=66, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config)


def left(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch, padded on the left, with positions."""
    order = torch.argsort(batch["attention_mask"], dim=1, stable=True)
    names = ("input_ids", "attention_mask", "completion_mask")
    moved = {name: batch[name].gather(1, order) for name in names}
    return {**batch, **moved, "position_ids": (moved["attention_mask"].cumsum(1) - 1).clamp(min=0)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "changes"), [("defaults", {}), ("fp32", {}), ("fp32", {"precompute_ref_log_probs": True})], ids=str
)
def test_positions_of_a_collator(tmp_path: Path, setup: str, changes: dict[str, Any]) -> None:
    """GPT-2 counts positions from the left edge if it is given none."""
    logged = {}
    for pad in (lambda batch: batch, left):
        inner = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=32)
        options = {"data_collator": lambda rows, inner=inner, pad=pad: pad(inner(rows))}
        trainer = made(tmp_path / pad.__name__.strip("<>"), gpt2(), setup, options, disable_dropout=True, **changes)
        trainer.train()
        logged[pad] = trainer.state.log_history[0]
    right, moved = logged.values()
    close = 2e-2 if setup == "defaults" else 1e-5
    assert moved["logps/chosen"] == pytest.approx(right["logps/chosen"], rel=close)
    assert moved["loss"] == pytest.approx(0.6931472, rel=5e-3)


@pytest.mark.parametrize("precompute", [False, True])
def test_every_input_of_the_model_reaches_policy_and_reference(tmp_path: Path, precompute: bool) -> None:
    """And nothing else: not TRL's KL completions, and no column of the trainer's own."""
    given: list[set[str]] = []

    class Recording(type(llama())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            given.append(set(kwargs))
            kwargs.pop("token_type_ids", None)
            return super().forward(*args, **kwargs)

    inner = DataCollatorForUnpairedPreference(pad_token_id=0)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = inner(rows)
        more = dict.fromkeys(("token_type_ids", "KL_input_ids", "KL_token_type_ids"), batch["input_ids"])
        return {**batch, **more, "sample_weight": torch.ones(len(rows))}

    model = llama()
    model.__class__ = Recording
    trainer = made(tmp_path, model, options={"data_collator": collate}, precompute_ref_log_probs=precompute)
    given.clear()
    trainer.train()
    for names in given:
        assert "token_type_ids" in names
        assert not {name for name in names if name.startswith("KL_")}
        assert not names & {"completion_mask", "label", "ref_logps", "sample_weight"}
    assert len(given) == (1 if precompute else 2)


def talks(rows: int = 8) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": f"w{row} w2"}],
            "completion": [{"role": "assistant", "content": "w3 w4" + " w5" * (row % 3)}],
            "label": row % 3 != 1,
        }
        for row in range(rows)
    ]


def pictured(rows: int = 8) -> Dataset:
    return Dataset.from_list(
        [
            {**talk, "images": [Image.new("RGB", (8, 8), (row * 30, 9, 200 - row * 20))]}
            for row, talk in enumerate(talks(rows))
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS)
def test_pictures(tmp_path: Path, setup: str) -> None:
    """Log-probs and logits of the first batch are those of TRL's KTO, which builds the same batch."""
    options = {"train_dataset": pictured(), "processing_class": llava_processor(), "eval_dataset": pictured(4)}
    ours = made(tmp_path / "ours", llava(), setup, options, max_steps=3)
    ours.train()
    args = KTOConfig(str(tmp_path / "kto"), **{**SETUPS[setup], **STEP, "loss_type": "apo_zero_unpaired"})
    stock = KTOTrainer(llava(), ref_model=llava(), args=args, **options)
    stock.train()
    mine, theirs = ours.state.log_history[0], stock.state.log_history[0]
    close = 1e-2 if setup == "defaults" else 1e-5
    for name in ("logps/chosen", "logps/rejected"):
        assert mine[name] == pytest.approx(theirs[name], rel=close)
    assert mine["loss"] == pytest.approx(0.6931472, rel=1e-3)
    assert ours.state.log_history[2]["loss"] < 0.68
    assert ours.evaluate()["eval_loss"] < 0.69
    # The pictures matter.
    dark = pictured().map(lambda row: {**row, "images": [Image.new("RGB", (8, 8))]})
    other = made(tmp_path / "dark", llava(), setup, {**options, "train_dataset": dark})
    other.train()
    assert other.state.log_history[0]["logps/chosen"] != pytest.approx(mine["logps/chosen"], rel=close / 10)


def test_a_processor_on_text_alone(tmp_path: Path) -> None:
    options = {"train_dataset": Dataset.from_list(talks()), "processing_class": llava_processor()}
    options["embedding_func"] = lambda texts: [[float(len(text))] for text in texts]
    trainer = made(tmp_path, llava(), "defaults", options)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0.3
    assert len(trainer.train_dataset["sample_weight"]) == 8
