"""The BCO trainer: its numbers against TRL 1.13's formulas, its data, references, checkpoints and density ratio."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from trl_models import SETUPS, llama, mixtral, pairs, tokenizer, unpaired

import fused_pref as fp
from fused_pref.trl import BCOConfig, BCOTrainer

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


# Relative errors of what is compared with numbers of another path: reference and policy make their log-probs in one
# product of bfloat16 each, whose rounding (2^-9) is of either's own blocks.
CLOSE = {"defaults": 2e-3, "fp32": 1e-5}


@pytest.fixture(params=SETUPS)
def setup(request: pytest.FixtureRequest) -> str:
    """As a user trains, with the trainer's defaults; and in float32."""
    return request.param


def config(folder: Path, setup: str = "fp32", **changes: Any) -> BCOConfig:
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2}
    return BCOConfig(str(folder), **{**SETUPS[setup], **sizes, **changes})


def made(
    folder: Path, data: Any = None, model: Any = None, options: dict[str, Any] | None = None, **changes: Any
) -> Any:
    set_seed(0)
    return BCOTrainer(
        model=model or llama(),
        args=config(folder, **changes),
        train_dataset=data or unpaired(),
        processing_class=tokenizer(),
        **(options or {}),
    )


def losses(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class RunningMoments:
    """The running mean of TRL 1.13."""

    def __init__(self) -> None:
        self.mean, self.count = 0.0, 1e-24

    def update(self, rewards: torch.Tensor) -> None:
        total = self.count + rewards.numel()
        self.mean += ((rewards.mean().float() - self.mean) * rewards.numel() / total).item()
        self.count = total


def trl_bco_loss(
    logps: torch.Tensor, ref_logps: torch.Tensor, desirable: torch.Tensor, moments: Any, beta: float
) -> Any:
    """TRL 1.13's `bco_loss` in a training step, its two classes apart as there: losses, chosen and rejected rewards."""
    chosen, rejected = (beta * (logps - ref_logps)[members] for members in (desirable, ~desirable))
    moments.update(torch.cat((chosen, rejected)).detach())
    losses = torch.cat((-F.logsigmoid(chosen - moments.mean), -F.logsigmoid(-(rejected - moments.mean))))
    return losses.nanmean(), chosen, rejected


def eager_logps(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return fp.reference.sequence_logps(logits, labels)


@pytest.mark.slow
def test_losses_are_those_of_trl_1_13(tmp_path: Path) -> None:
    """Step by step on identical batches, with gradients, δ and the logged metrics."""
    trainer = made(
        tmp_path, delta_update="forward", train_sampling_strategy="sequential", optim="sgd", learning_rate=0.1
    )
    twin, reference, moments = llama(), llama(), RunningMoments()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    trainer.args.lr_scheduler_type = "constant"
    want = []
    for batch in trainer.get_train_dataloader():
        desirable = batch["label"].bool()
        with torch.no_grad():
            ref_logps = eager_logps(reference, batch)
        logps = eager_logps(twin, batch)
        loss, chosen, rejected = trl_bco_loss(logps, ref_logps, desirable, moments, trainer.beta)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        want.append(
            {
                "loss": loss.item(),
                "grad_norm": norm.item(),
                "delta": moments.mean,
                "rewards/chosen": chosen.mean().item(),
                "rewards/rejected": rejected.mean().item(),
                "rewards/margins": (chosen.mean() - rejected.mean()).item(),
                "logps/chosen": logps[desirable].mean().item(),
                "logps/rejected": logps[~desirable].mean().item(),
            }
        )
    trainer.train()
    assert len(want) == 4
    for mine, theirs in zip(trainer.state.log_history, want, strict=False):
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert abs(want[-1]["delta"]) > 1e-3


@pytest.mark.slow
def test_loss_falls_and_the_metrics_are_logged(tmp_path: Path, setup: str) -> None:
    trainer = made(tmp_path, max_steps=12, setup=setup, delta_kind="ema")
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931472, rel=CLOSE[setup])  # policy and reference are the same
    assert losses(trainer)[-1] < 0.5
    assert losses(trainer, "rewards/margins")[-1] > 1
    entry = trainer.state.log_history[-2]
    for name in ("rewards", "logps", "logits"):
        assert f"{name}/chosen" in entry
        assert f"{name}/rejected" in entry
    assert trainer.args.bf16 == trainer.args.gradient_checkpointing == (setup == "defaults")
    assert losses(trainer, "delta")[0] == 0
    assert losses(trainer, "delta")[1:] != [0] * 11
    assert not any(name.startswith("count") or name.endswith("_sum") for name in entry)


@pytest.mark.slow
def test_delta_moves_once_a_step(tmp_path: Path) -> None:
    """With "step" it is constant over the microbatches of a step; with "forward" it is not."""
    seen: dict[str, list[float]] = {"step": [], "forward": []}
    for update, deltas in seen.items():
        trainer = made(tmp_path, delta_update=update, gradient_accumulation_steps=2, per_device_train_batch_size=2)
        keep = trainer._keep
        trainer._keep = lambda output, *rest, keep=keep, deltas=deltas: (
            deltas.append(output.delta.item()),
            keep(output, *rest),
        )
        trainer.train()
    steps, forwards = seen.values()
    assert len(steps) == len(forwards) == 8
    assert steps[0::2] == steps[1::2]
    assert len(set(steps)) == 4
    assert len(set(forwards[2:])) == 6


@pytest.mark.slow
@pytest.mark.parametrize(("setup", "update"), [("defaults", "step"), ("fp32", "forward")])
def test_resuming_goes_on_bit_for_bit(tmp_path: Path, setup: str, update: str) -> None:
    options = {
        "delta_kind": "ema",
        "delta_update": update,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 5,  # an epoch has 4
        "setup": setup,
    }
    embedding = {"embedding_func": embedded}
    whole = made(tmp_path / "whole", options=embedding, **options)
    whole.train()
    resumed = made(tmp_path / "resumed", options=embedding, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name in ("loss", "delta", "rewards/margins"):
        assert losses(resumed, name) == losses(whole, name)
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for name, value in whole.reward_shift.state_dict().items():
        assert torch.equal(resumed.reward_shift.state_dict()[name], value)
    saved = {path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert {"reward_shift.safetensors", "density_ratio.safetensors"} <= saved
    assert not any(name.endswith((".pkl", ".joblib")) for name in saved)


@pytest.mark.slow
def test_a_checkpoint_without_a_file_of_ours_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "options": {"embedding_func": embedded}}
    made(tmp_path, **options).train()
    names = "reward_shift.safetensors", "density_ratio.safetensors"
    for checkpoint, name in zip(("checkpoint-1", "checkpoint-2"), names, strict=True):
        (tmp_path / checkpoint / name).unlink()
        with pytest.raises(ValueError, match=f"has no {re.escape(name)}"):
            made(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / checkpoint))


@pytest.mark.slow
def test_references_agree(tmp_path: Path, setup: str) -> None:
    """A deep copy, a model given, and precomputed log-probs: the same run."""
    copied = made(tmp_path, setup=setup)
    given = made(tmp_path, options={"ref_model": llama()}, setup=setup)
    cached = made(tmp_path, precompute_ref_log_probs=True, setup=setup)
    assert copied.ref_model is not copied.model
    assert cached.ref_model is None
    for trainer in (copied, given, cached):
        trainer.train()
    assert losses(copied) == losses(given)
    assert losses(cached) == pytest.approx(losses(copied), rel=CLOSE[setup])
    for mine, theirs in zip(copied.ref_model.parameters(), llama().parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_an_adapter_is_disabled_for_the_reference(tmp_path: Path, setup: str) -> None:
    trainer = made(tmp_path, options={"peft_config": LORA}, learning_rate=0.1, max_steps=6, setup=setup)
    assert trainer.ref_model is None
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    ref_logps, _ = trainer.compute_ref_log_probs(trainer.model, batch)
    close = {"rtol": 1e-2, "atol": 0.0} if setup == "defaults" else {}
    torch.testing.assert_close(ref_logps, eager_logps(llama(), batch).detach(), **close)
    assert losses(trainer)[0] == pytest.approx(0.6931472, rel=CLOSE[setup])
    assert losses(trainer)[-1] < 0.68


@pytest.mark.slow
def test_paired_and_conversational_data(tmp_path: Path, setup: str) -> None:
    trainer = made(tmp_path, data=pairs(8), setup=setup)
    assert len(trainer.train_dataset) == 16
    assert sorted(trainer.train_dataset["label"]) == [False] * 8 + [True] * 8
    talk = [
        {
            "prompt": [{"role": "user", "content": "w1 w2"}],
            "completion": [{"role": "assistant", "content": text}],
            "label": label,
        }
        for text, label in (("w3", True), ("w4 w5", False))
    ]
    trainer = made(tmp_path, data=Dataset.from_list(talk * 4), setup=setup)
    trainer.train()
    assert len(losses(trainer)) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("setup", "label"), [("defaults", True), ("fp32", False)])
def test_a_missing_class(tmp_path: Path, setup: str, label: bool) -> None:
    data = Dataset.from_list([{**row, "label": label} for row in unpaired(8)])
    trainer = made(tmp_path, data=data, max_steps=3, setup=setup)
    trainer.train()
    there, absent = ("chosen", "rejected") if label else ("rejected", "chosen")
    assert len(losses(trainer)) == len(losses(trainer, f"rewards/{there}")) == 3
    assert losses(trainer, f"rewards/{absent}") == losses(trainer, "rewards/margins") == []
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_shuffled_sampling(tmp_path: Path) -> None:
    def first(**changes: Any) -> list[int]:
        loader = made(tmp_path, **changes).get_train_dataloader()
        return [row for batch in loader for row in batch["input_ids"][:, 1].tolist()]

    in_order = first(train_sampling_strategy="sequential")
    assert first() != in_order
    assert sorted(first()) == sorted(in_order)


@pytest.mark.slow
def test_exact_accumulation_is_one_big_batch(tmp_path: Path, setup: str) -> None:
    small = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 5}
    options = {"max_steps": 1, "delta_kind": "fixed", "delta_value": 0.3, "learning_rate": 0.0, "setup": setup}
    data = unpaired(12)  # the last of the three microbatches has 2 rows
    big = made(tmp_path, data, per_device_train_batch_size=12, **options)
    exact = made(tmp_path, data, exact_accumulation=True, **small, **options)
    means = made(tmp_path, data, **small, **options)
    for trainer in (big, exact, means):
        trainer.train()
    norms = [losses(trainer, "grad_norm")[0] for trainer in (big, exact, means)]
    assert norms[1] == pytest.approx(norms[0], rel=CLOSE[setup])
    assert norms[2] != pytest.approx(norms[0], rel=1e-3)
    assert losses(exact)[0] == pytest.approx(losses(big)[0], rel=CLOSE[setup])


@pytest.mark.slow
def test_class_weights(tmp_path: Path, setup: str) -> None:
    """Losses of a class are multiplied; at the start each is log 2."""
    trainer = made(
        tmp_path, desirable_weight=2.0, undesirable_weight=0.5, train_sampling_strategy="sequential", setup=setup
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931472 * (3 * 2.0 + 0.5) / 4, rel=CLOSE[setup])


@pytest.mark.slow
def test_evaluation(tmp_path: Path, setup: str) -> None:
    """δ stays as it is, and `compute_metrics` gets rewards and labels."""
    seen = []
    options = {
        "eval_dataset": unpaired(10),
        "compute_metrics": lambda result: seen.append(result) or {"seen": len(result.predictions)},
    }
    trainer = made(tmp_path, options=options, setup=setup)
    trainer.train()
    before = trainer.reward_shift.state_dict()["mean"].clone()
    metrics = trainer.evaluate()
    assert torch.equal(trainer.reward_shift.state_dict()["mean"], before)
    assert metrics["eval_seen"] == 10
    assert seen[0].predictions.shape == seen[0].label_ids.shape == (10,)
    logged = trainer.state.log_history[-1]
    members = torch.tensor(seen[0].label_ids).bool()
    rewards = torch.tensor(seen[0].predictions)
    assert logged["eval_rewards/chosen"] == pytest.approx(rewards[members].mean().item(), rel=1e-5)
    assert logged["eval_rewards/rejected"] == pytest.approx(rewards[~members].mean().item(), rel=1e-5)


@pytest.mark.slow
def test_mixture_of_experts(tmp_path: Path, setup: str) -> None:
    trainer = made(tmp_path, model=mixtral(), max_steps=1, setup=setup)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(0.6931472 + 0.5 * entry["aux_loss"], rel=10 * CLOSE[setup])
    assert entry["aux_loss"] > 1


# Underlying distribution matching.


def embedded(prompts: list[str]) -> torch.Tensor:
    """Two features of a prompt: its length, and its first token."""
    return torch.tensor([[len(text.split()), float(text.split()[0][1:]) / 10] for text in prompts])


@pytest.mark.slow
def test_prompts_are_weighed(tmp_path: Path, setup: str) -> None:
    trainer = made(tmp_path, options={"embedding_func": embedded}, train_sampling_strategy="sequential", setup=setup)
    rows = unpaired()
    ratio = fp.DensityRatio(min_ratio=0.5, max_ratio=10.0)
    ratio.load_state_dict(trainer.density_ratio.state_dict())
    want = ratio(embedded(rows["prompt"]), torch.tensor(rows["label"]))
    assert trainer.train_dataset["sample_weight"] == pytest.approx(want.tolist(), rel=1e-6)
    assert len(set(want.tolist())) > 2
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931472 * want[:4].mean().item(), rel=CLOSE[setup])


@pytest.mark.slow
def test_the_prompts_fitted_are_drawn_by_the_seed(tmp_path: Path) -> None:
    def fitted(seed: int) -> torch.Tensor:
        options = {"embedding_func": embedded}
        trainer = made(tmp_path, unpaired(40), options=options, prompt_sample_size=6, seed=seed)
        return trainer.density_ratio.coefficients

    assert torch.equal(fitted(1), fitted(1))
    assert not torch.equal(fitted(1), fitted(2))


def test_every_prompt_is_embedded_once(tmp_path: Path) -> None:
    """Those of undesirable rows, and of the desirable ones that are drawn."""
    seen: list[str] = []
    rows = unpaired(40).map(lambda row, number: {"prompt": f"w{number} w1"}, with_indices=True)
    options = {"embedding_func": lambda prompts: seen.extend(prompts) or embedded(prompts)}
    made(tmp_path, rows, options=options, prompt_sample_size=6)
    undesirable = {row["prompt"] for row in rows if not row["label"]}
    assert undesirable < set(seen)
    assert len(seen) == len(set(seen)) == len(undesirable) + 6


def test_an_embedding_model_with_its_own_tokenizer(tmp_path: Path, setup: str) -> None:
    shapes = []

    def embed(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        shapes.append(input_ids.shape)
        return torch.stack((attention_mask.sum(1), input_ids[:, 0]), 1)

    options = {"embedding_func": embed, "embedding_tokenizer": tokenizer()}
    trainer = made(tmp_path, options=options, setup=setup)
    assert "sample_weight" in trainer.train_dataset.column_names
    assert all(rows <= 4 for rows, _ in shapes)
    with pytest.raises(ValueError, match=r"embedding_func must be a function that returns"):
        made(tmp_path, options={"embedding_func": lambda prompts: torch.zeros(1, 2)})
