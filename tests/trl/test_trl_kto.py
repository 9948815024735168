"""The KTO trainer against TRL's on the same seed and data, and what it adds."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from PIL import Image
from transformers import set_seed
from trl import KTOConfig as StockKTOConfig
from trl import KTOTrainer as StockKTOTrainer
from trl_models import SETUPS, llama, llava, llava_processor, mixtral, pairs, sharp, tokenizer, unpaired
from trl_runs import UNTIMED, assert_same_run, flat

import fused_pref as fp
from fused_pref.trl import KTOConfig, KTOTrainer

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
BOTH = (KTOTrainer, StockKTOTrainer)
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
APO = {"loss_type": "apo_zero_unpaired"}


def made(kind: type, folder: Path, make: Any = llama, options: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A trainer, whose rewards are of order one."""
    set_seed(0)
    setup = SETUPS[changes.pop("setup", "fp32")]
    steps = {"max_steps": 2, "learning_rate": 0.05, "optim": "sgd"}
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "beta": 0.3}
    args = changes.pop("config", StockKTOConfig)(str(folder), **{**setup, **steps, **sizes, **changes})
    given = {"train_dataset": unpaired(), "eval_dataset": unpaired(6), "ref_model": sharp, **(options or {})}
    given["ref_model"] = given["ref_model"]() if callable(given["ref_model"]) else given["ref_model"]
    given = {"processing_class": tokenizer(), **given}
    trainer = kind(model=make(), args=args, **given)
    trainer.start = copy.deepcopy(trainer.model)
    return trainer


def logged(trainer: Any, name: str = "loss") -> list[float]:
    """One number of every step, or every evaluation, that logged it."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def trained(*given: Any, **changes: Any) -> Any:
    trainer = made(*given, **changes)
    trainer.train()
    return trainer


def assert_rewards_matter(trainer: Any) -> None:
    assert max(map(abs, logged(trainer, "rewards/chosen"))) > 0.3


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
RUNS: dict[str, dict[str, Any]] = {
    "activation checkpointing": {"gradient_checkpointing": True, "max_steps": 4, **EVALUATED},
    "weights, logged every other step": {
        "desirable_weight": 1.7,
        "undesirable_weight": 0.4,
        "logging_steps": 2,
        "max_steps": 4,
    },
    "apo with weights": {**APO, **EVALUATED, "desirable_weight": 0.5, "undesirable_weight": 2.0},
    "microbatches, the last of them uneven": {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 4,
        "max_steps": 3,
    },
    "precomputed in other batches": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3, **EVALUATED},
    "a synchronised reference": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
}


@pytest.mark.parametrize("name", RUNS)
def test_run_is_that_of_trl(tmp_path: Path, name: str) -> None:
    ours, stock = (trained(kind, tmp_path, **RUNS[name]) for kind in BOTH)
    assert_same_run(ours, stock, tolerance=1e-4)
    assert_rewards_matter(ours)
    assert (max(logged(ours, "kl")) > 0.1) == (RUNS[name].get("loss_type") is None)


@pytest.mark.parametrize("changes", [{"beta": 0.0}, {"desirable_weight": -1.0}], ids=str)
def test_what_the_loss_refuses_takes_trl_s_path(tmp_path: Path, changes: dict[str, Any]) -> None:
    name = next(iter(changes))
    with pytest.warns(UserWarning, match=f"TRL's own loss is used: {name} must be"):
        ours = trained(KTOTrainer, tmp_path, **changes)
    stock = trained(StockKTOTrainer, tmp_path, **changes)
    for mine, theirs in zip(ours.state.log_history, stock.state.log_history, strict=True):
        assert {key: value for key, value in mine.items() if not key.endswith(UNTIMED)} == {
            key: value for key, value in theirs.items() if not key.endswith(UNTIMED)
        }
    with pytest.raises(ValueError, match=f"exact_accumulation needs this trainer's own loss; .* {name} must be"):
        made(KTOTrainer, tmp_path, options={"exact_accumulation": True}, **changes)


def test_pairs(tmp_path: Path) -> None:
    ours, stock = (trained(kind, tmp_path, options={"train_dataset": pairs()}) for kind in BOTH)
    assert_same_run(ours, stock, tolerance=1e-4)


def test_a_stream_and_several_evaluation_sets(tmp_path: Path) -> None:
    stream = unpaired().to_iterable_dataset()
    options = {"train_dataset": stream, "eval_dataset": {"rows": unpaired(6), "stream": stream}}
    ours, stock = (trained(kind, tmp_path, options=options, **EVALUATED) for kind in BOTH)
    assert_same_run(ours, stock, tolerance=1e-4)


def test_router_losses(tmp_path: Path) -> None:
    options = {"ref_model": lambda: sharp(mixtral)}
    ours, stock = (trained(kind, tmp_path, mixtral, options) for kind in BOTH)
    assert_same_run(ours, stock, tolerance=1e-4)
    assert logged(ours, "aux_loss")[0] > 1


def test_lora(tmp_path: Path) -> None:
    options = {"peft_config": LORA, "ref_model": None}
    changes = {"learning_rate": 0.3, "beta": 1.0, "max_steps": 6}
    ours, stock = (trained(kind, tmp_path, options=options, **changes) for kind in BOTH)
    assert_same_run(ours, stock, tolerance=2e-4)
    assert ours.ref_model is None
    assert_rewards_matter(ours)


def test_prompt_tuning(tmp_path: Path) -> None:
    options = {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "ref_model": None}
    ours, stock = (trained(kind, tmp_path, options=options, learning_rate=1.0, beta=1.0) for kind in BOTH)
    assert_same_run(ours, stock, tolerance=2e-4)


def talks(rows: int = 8, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": f"w{row} w2"}],
            "completion": [{"role": "assistant", "content": "w3 w4" + " w5" * (row % 3)}],
            "label": row % 3 != 1,
            **{name: value(row) for name, value in more.items()},
        }
        for row in range(rows)
    ]


def test_pictures(tmp_path: Path) -> None:
    data = Dataset.from_list(talks(images=lambda row: [Image.new("RGB", (8, 8), (row * 30, 9, 200 - row * 20))]))

    def reference() -> Any:
        model = llava()
        with torch.no_grad():
            model.lm_head.weight.mul_(1.25)
        return model

    runs = []
    for kind in BOTH:
        options = {"train_dataset": data, "eval_dataset": data, "processing_class": llava_processor()}
        runs.append(trained(kind, tmp_path, llava, {**options, "ref_model": reference}, **EVALUATED))
    assert_same_run(*runs, tolerance=1e-4)


# TRL rounds logits to bfloat16, and we do not.
BF16 = 2e-2


def test_bf16_defaults(tmp_path: Path) -> None:
    ours, stock = (
        trained(kind, tmp_path, setup="defaults", optim="adamw_torch", learning_rate=1e-5, **EVALUATED) for kind in BOTH
    )
    assert ours.args.bf16
    for mine, theirs in zip(ours.state.log_history, stock.state.log_history, strict=True):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            if not name.endswith(UNTIMED):
                # Rewards are differences of log-probs of up to 30.
                assert mine[name] == pytest.approx(theirs[name], rel=BF16, abs=BF16), name


def test_the_logits_go_to_compute_metrics(tmp_path: Path) -> None:
    runs = []
    for kind in BOTH:
        seen: list[Any] = []
        options = {"compute_metrics": lambda result, seen=seen: seen.append(result) or {"seen": len(seen)}}
        trained(kind, tmp_path, options=options, **EVALUATED, max_steps=2)
        runs.append(seen[0])
    mine, theirs = runs
    assert mine.predictions.shape == theirs.predictions.shape
    assert mine.predictions == pytest.approx(theirs.predictions, rel=1e-3, abs=1e-4)
    assert (mine.label_ids == theirs.label_ids).all()


def test_the_reference_of_a_model_is_its_copy(tmp_path: Path) -> None:
    trainer = trained(KTOTrainer, tmp_path, options={"ref_model": None})
    assert torch.equal(flat(trainer.ref_model), flat(llama()))
    assert not torch.equal(flat(trainer.model), flat(llama()))
    cached = trained(KTOTrainer, tmp_path, options={"ref_model": None}, precompute_ref_log_probs=True)
    assert cached.ref_model is None
    assert logged(cached) == pytest.approx(logged(trainer), rel=1e-5)


def _on_cpu(check: Any) -> Any:
    def on_cpu(config: Any) -> None:
        config.use_cpu = True
        check(config)

    return on_cpu


def test_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The default configuration asks for bf16, which transformers refuses without a GPU.
    monkeypatch.setattr(KTOConfig, "__post_init__", _on_cpu(KTOConfig.__post_init__))
    trainer = KTOTrainer(llama(), train_dataset=unpaired(), processing_class=tokenizer())
    assert isinstance(trainer.args, KTOConfig)
    assert trainer.args.output_dir.endswith("-KTO")


def test_resuming_goes_on_bit_for_bit(tmp_path: Path) -> None:
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "exact_accumulation": True,
        "config": KTOConfig,
    }
    options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    whole = trained(KTOTrainer, tmp_path / "whole", **options)
    resumed = made(KTOTrainer, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(flat(resumed.model), flat(whole.model))
    assert logged(resumed, "kl") == logged(whole, "kl")


BIG = ["kto in fp32", "kto in defaults", "apo in fp32"]


@pytest.mark.parametrize("name", BIG)
def test_exact_accumulation_is_one_big_batch(tmp_path: Path, name: str) -> None:
    """Microbatches of 5, 5 and 2 rows; the KL completions are those of the step, too."""
    loss_type, setup = name.split(" in ")
    small = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 5, "config": KTOConfig}
    changes = {"max_steps": 2, "setup": setup, "desirable_weight": 1.5, **(APO if loss_type == "apo" else {})}
    options = {"train_dataset": unpaired(12), "eval_dataset": None}
    big = trained(KTOTrainer, tmp_path, options=options, per_device_train_batch_size=12, **changes)
    exact = trained(KTOTrainer, tmp_path, options=options, exact_accumulation=True, **small, **changes)
    close = 2e-2 if setup == "defaults" else 1e-4
    for mine, theirs in zip(exact.state.log_history[:2], big.state.log_history[:2], strict=True):
        assert mine == pytest.approx(theirs, rel=close, abs=close / 10)
    assert (logged(exact, "kl")[0] > 0.1) == (loss_type == "kto")
    if name == "kto in fp32":
        means = trained(KTOTrainer, tmp_path, options=options, **small, **changes)
        assert logged(means, "grad_norm")[0] != pytest.approx(logged(big, "grad_norm")[0], rel=100 * close)


# Objectives of one's own.


def kto_by_hand(sequences: Any, desirable: torch.Tensor, kl: torch.Tensor) -> torch.Tensor:
    margin = 0.3 * (sequences.logps - sequences.ref_logps - kl)
    return torch.where(desirable, 1 - margin.sigmoid(), margin.sigmoid())


def test_an_objective_of_ones_own_is_the_named_one(tmp_path: Path) -> None:
    changes = {"exact_accumulation": True, "config": KTOConfig, "gradient_accumulation_steps": 2}
    named = trained(KTOTrainer, tmp_path, **changes)
    own = trained(KTOTrainer, tmp_path, options={"objective": kto_by_hand}, **changes)
    assert_same_run(own, named, tolerance=1e-5)


def test_an_objective_finds_its_tensors_in_the_columns(tmp_path: Path) -> None:
    rows = unpaired().map(lambda row, number: {"strength": 0.5 + number % 4, "group": number}, with_indices=True)
    seen: list[torch.Tensor] = []

    def objective(sequences: Any, strength: torch.Tensor, desirable: torch.Tensor) -> torch.Tensor:
        seen.append(strength)
        sign = desirable.double() * 2 - 1
        return -torch.nn.functional.logsigmoid(strength * sign * (sequences.logps - sequences.ref_logps))

    options = {"train_dataset": rows, "eval_dataset": rows, "objective": objective}
    trainer = trained(KTOTrainer, tmp_path, options=options, max_steps=4)
    assert not trainer.calculate_KL
    assert set(logged(trainer, "kl")) == {0.0}
    assert {value for strength in seen for value in strength.tolist()} == {0.5, 1.5, 2.5, 3.5}
    with pytest.raises(ValueError, match="train_dataset must have strength, which objective takes; got"):
        made(KTOTrainer, tmp_path, options={"objective": objective, "eval_dataset": None})
    with pytest.raises(TypeError, match="objective must be a function"):
        made(KTOTrainer, tmp_path, options={"objective": "kto"})


def test_options_are_taken_from_either_place(tmp_path: Path) -> None:
    given = made(KTOTrainer, tmp_path, options={"exact_accumulation": True, "memory_budget": 2**28})
    configured = made(KTOTrainer, tmp_path, config=KTOConfig, exact_accumulation=True, memory_budget=2**28)
    for trainer in (given, configured):
        assert trainer.exact_accumulation
        assert trainer.memory_budget == 2**28
    assert not made(KTOTrainer, tmp_path).exact_accumulation


def test_loss_is_that_of_the_function(tmp_path: Path) -> None:
    """Of the first batch, by the reference implementation."""
    trainer = trained(KTOTrainer, tmp_path, max_steps=1, desirable_weight=1.7)
    batch = next(iter(trainer.get_train_dataloader()))
    logps = {}
    for name, model in {"policy": llama(), "reference": sharp()}.items():
        for prefix in ("", "KL_"):
            ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
            logits = model(ids, attention_mask=mask).logits
            labels = ids.masked_fill(batch[f"{prefix}completion_mask"] == 0, -100)
            logps[prefix + name] = fp.reference.sequence_logps(logits, labels).detach()
            if name == "policy" and not prefix:
                scored = logits, labels
    kl = (logps["KL_policy"] - logps["KL_reference"]).mean().clamp(min=0)
    given = {"kl": kl, "beta": 0.3, "desirable_weight": 1.7}
    output = fp.reference.kto_loss(*scored, batch["label"].bool(), logps["reference"], **given)
    assert logged(trainer)[0] == pytest.approx(output.loss.item(), rel=1e-5)
