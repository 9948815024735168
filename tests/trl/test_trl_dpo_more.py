"""What the DPO trainer adds: objectives of one's own, exact accumulation, a reward shift; and the data it takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from PIL import Image
from torch import Tensor
from transformers import set_seed
from trl.trainer.dpo_config import DPOConfig as StockDPOConfig
from trl.trainer.dpo_trainer import DPOTrainer as StockDPOTrainer
from trl_models import SETUPS, TRAINING, llama, llava, llava_processor, pairs, tokenizer

import fused_pref as fp
from fused_pref.trl import DPOConfig, DPOTrainer

# Libraries warn of what is not ours to change.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]
BETA = 0.2


def made(folder: Path, kind: type = DPOTrainer, options: dict[str, Any] | None = None, **changes: Any) -> Any:
    steps = {"learning_rate": 0.02, "optim": "sgd", "lr_scheduler_type": "constant", "beta": BETA, "max_steps": 2}
    config = DPOConfig if kind is DPOTrainer else StockDPOConfig
    args = config(str(folder), **{**TRAINING, **steps, "per_device_train_batch_size": 4, **changes})
    given = {"ref_model": llama(seed=3), "train_dataset": pairs(), "processing_class": tokenizer(), **(options or {})}
    set_seed(0)
    return kind(model=given.pop("model", None) or llama(), args=args, **given)


def trained(*given: Any, **changes: Any) -> Any:
    trainer = made(*given, **changes)
    trainer.train()
    return trainer


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_same_numbers(ours: Any, stock: Any, tolerance: float = 1e-4, but: tuple[str, ...] = ()) -> None:
    assert len(ours.state.log_history) == len(stock.state.log_history)
    for mine, theirs in zip(ours.state.log_history, stock.state.log_history, strict=True):
        assert mine.keys() == theirs.keys()
        for name in theirs.keys() - {*but}:
            if not name.endswith(("runtime", "per_second")):
                assert mine[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), name
    for mine, theirs in zip(ours.model.parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


# Objectives of one's own.


def difference(chosen: fp.Sequences, rejected: fp.Sequences) -> Tensor:
    return chosen.logps - chosen.ref_logps - rejected.logps + rejected.ref_logps  # type: ignore[operator]


def sigmoid(chosen: fp.Sequences, rejected: fp.Sequences) -> Tensor:
    return -F.logsigmoid(BETA * difference(chosen, rejected))


def apo_zero(sequences: fp.Sequences, desirable: Tensor) -> Tensor:
    """Twice, since it is a mean over sequences."""
    reward = torch.sigmoid(BETA * (sequences.logps - sequences.ref_logps))  # type: ignore[operator]
    return 2 * torch.where(desirable, 1 - reward, reward)


def hinge(sequences: fp.Sequences, desirable: Tensor) -> Tensor:
    rewards = BETA * (sequences.logps - sequences.ref_logps)  # type: ignore[operator]
    return F.relu(1 - rewards[desirable] + rewards[~desirable]).mean()


@pytest.mark.parametrize(("objective", "unit"), [(sigmoid, 2), (apo_zero, 1), (hinge, None)])
def test_an_objective_of_one_s_own_is_the_named_one(tmp_path: Path, objective: Any, unit: Any) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "ld_alpha": 0.5}
    own = trained(tmp_path, options={"objective": objective, "unit": unit, "eval_dataset": pairs(6)}, **options)
    named = trained(tmp_path, options={"eval_dataset": pairs(6)}, loss_type=objective.__name__, **options)
    assert_same_numbers(own, named, 1e-5)


@pytest.mark.parametrize("stream", [False, True])
def test_tensors_are_columns_of_the_dataset(tmp_path: Path, stream: bool) -> None:
    """By the names of the objective's parameters; those with a default are not asked for."""
    seen = []

    def objective(chosen: Any, rejected: Any, margin: Tensor, pairs: Tensor, scale: float = 1.0) -> Tensor:
        seen.append((margin, pairs))
        return -F.logsigmoid(BETA * difference(chosen, rejected) - margin) * scale * pairs[:, 1]

    rows = [{**row, "margin": number / 4, "pairs": [number, 1]} for number, row in enumerate(pairs(8))]
    data: Any = IterableDataset.from_generator(lambda: iter(rows)) if stream else Dataset.from_list(rows)
    options = {"objective": objective, "train_dataset": data, "eval_dataset": {"a": Dataset.from_list(rows)}}
    trainer = trained(tmp_path, options=options, precompute_ref_log_probs=not stream)
    batch = next(iter(trainer.get_eval_dataloader("a")))
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    margins, numbers = seen[-1]
    assert torch.equal(margins, torch.arange(8.0) / 4)
    assert torch.equal(numbers, torch.stack([torch.arange(8), torch.ones(8, dtype=torch.long)], 1))
    plain = made(tmp_path, options={"model": trainer.model, "ref_model": trainer.ref_model})
    assert loss > 1.2 * plain.compute_loss(plain.model.eval(), batch)


def test_objectives_that_are_refused(tmp_path: Path) -> None:
    def needs(chosen: Any, rejected: Any, margin: Tensor) -> Tensor:
        return chosen.logps + margin

    rows: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
        ({"objective": "sigmoid"}, {}, TypeError, "objective must be a function of Sequences; got 'sigmoid'"),
        ({"objective": sigmoid, "unit": 3}, {}, ValueError, "unit must be 2 .*; got 3"),
        ({"unit": 1}, {}, ValueError, "unit needs an objective; got 1"),
        ({"objective": needs}, {}, ValueError, "train_dataset must have margin, which objective takes; got prompt"),
        ({"objective": sigmoid}, {"loss_type": "ipo"}, ValueError, r"loss_type must stay \['sigmoid'\] beside an obj"),
        ({"objective": sigmoid}, {"use_weighting": True}, ValueError, "use_weighting must stay False beside an obj"),
        ({"objective": hinge, "unit": None}, {"exact_accumulation": True}, ValueError, "unit=None is a loss of the"),
        ({}, {"exact_accumulation": True, "loss_type": ["hinge", "aot"]}, ValueError, "aot sorts the pairs of a batch"),
        ({}, {"exact_accumulation": True, "beta": -1.0}, ValueError, r"TRL's own loss is used \(beta must be"),
        (
            {},
            {"exact_accumulation": True, "use_weighting": True, "loss_type": ["hinge", "sft"]},
            ValueError,
            "use_weighting multiplies sft by the mean factor",
        ),
        (
            {},
            {"exact_accumulation": True, "loss_type": "bco_pair", "delta_kind": "ema", "delta_update": "forward"},
            ValueError,
            "delta_update='forward' moves delta between the microbatches",
        ),
        (
            {},
            {"use_weighting": True, "loss_type": "bco_pair", "delta_kind": "ema", "delta_update": "forward"},
            ValueError,
            "use_weighting needs a delta that is known before the batch",
        ),
    ]
    for options, changes, error, match in rows:
        with pytest.raises(error, match=match):
            made(tmp_path / "out", options=options, **changes)
    assert list(tmp_path.iterdir()) == []
    text = Dataset.from_list([{**row, "margin": "wide"} for row in pairs(8)])
    trainer = made(tmp_path, options={"objective": needs, "train_dataset": text})
    with pytest.raises(ValueError, match="the column margin, which objective takes, must have a number in every row"):
        next(iter(trainer.get_train_dataloader()))
    nulls = pairs(8).add_column("margin", [0.5, None, *[0.5] * 6])
    with pytest.raises(
        ValueError, match=r"train_dataset\[1\]\['margin'\] must be a number, which objective takes; got None"
    ):
        made(tmp_path, options={"objective": needs, "train_dataset": nulls})


# Exact accumulation.


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "delta_value": 0.1}),
        ({}, {"use_weighting": True, "loss_type": "ipo"}),
        ({}, {"loss_type": ["hinge", "sft"], "ld_alpha": 0.5}),
        ({"objective": apo_zero, "unit": 1}, {}),
    ],
    ids=["mixture", "weighting", "ld_alpha", "objective"],
)
def test_exact_accumulation_is_one_big_batch(tmp_path: Path, options: Any, changes: Any) -> None:
    """The last of the microbatches is smaller than the others."""
    small = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 5}
    both = {"options": {**options, "train_dataset": pairs(12)}, "learning_rate": 0.0, "max_steps": 1, **changes}
    big = trained(tmp_path, per_device_train_batch_size=12, **both)
    exact = trained(tmp_path, exact_accumulation=True, **small, **both)
    means = trained(tmp_path, **small, **both)
    norms = [logged(trainer, "grad_norm")[0] for trainer in (big, exact, means)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert norms[2] != pytest.approx(norms[0], rel=1e-3)
    assert logged(exact)[0] == pytest.approx(logged(big)[0], rel=1e-5)


@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_sft_beside_weighting_has_the_mean_factor_of_the_batch(tmp_path: Path, ld_alpha: float | None) -> None:
    """Where TRL 1.16 fails; by its formula, of logits."""
    names = {"loss_type": ["hinge", "sft"], "loss_weights": [0.5, 2.0], "use_weighting": True, "ld_alpha": ld_alpha}
    both = made(tmp_path, **names)
    batch = next(iter(both.get_train_dataloader()))
    got = both.compute_loss(both.model, batch)
    with torch.no_grad():
        logp = both.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    mask = batch["completion_mask"][:, 1:]
    token = logp.gather(2, batch["input_ids"][:, 1:, None])[..., 0] * mask
    aligned = token - torch.logsumexp(2 * logp, -1) * mask
    chosen, rejected = (aligned.sum(1) / mask.sum(1)).exp().chunk(2)
    sft = -token[:4].sum() / mask[:4].sum() * (chosen * rejected).mean()
    hinge = made(tmp_path, **{**names, "loss_type": ["hinge"], "loss_weights": [0.5]})
    torch.testing.assert_close(got, hinge.compute_loss(hinge.model, batch) + 2 * sft)


# The reward shift.


@pytest.mark.parametrize(
    "changes",
    [{"delta_kind": "ema"}, {"delta_kind": "running_mean", "delta_update": "forward"}, {"use_weighting": True}],
    ids=str,
)
def test_resuming_goes_on_bitwise(tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {"delta_kind": "ema", **changes, "loss_type": ["bco_pair", "sigmoid"], "max_steps": 4}
    changes |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    whole = trained(tmp_path / "whole", save_strategy="steps", save_steps=2, **changes)
    resumed = made(tmp_path / "resumed", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name in ("loss", "delta", "rewards/margins"):
        assert logged(resumed, name) == logged(whole, name)
    for name, value in whole.reward_shift.state_dict().items():
        assert torch.equal(resumed.reward_shift.state_dict()[name], value)
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    deltas = logged(whole, "delta")
    assert (deltas[0] == 0) == (changes.get("delta_update") != "forward")
    assert abs(deltas[3] - deltas[1]) > 1e-4
    (tmp_path / "whole" / "checkpoint-2" / "reward_shift.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no reward_shift\.safetensors"):
        made(tmp_path / "again", **changes).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_a_fixed_shift_is_taken_off_the_rewards(tmp_path: Path) -> None:
    """And by default it is 0, as TRL's; nothing of it is saved."""
    fixed, none = (trained(tmp_path, loss_type="bco_pair", delta_value=value) for value in (0.7, 0.0))
    assert logged(fixed)[0] != pytest.approx(logged(none)[0], rel=1e-2)
    assert fixed.reward_shift is None
    assert logged(fixed, "delta") == []
    stock = trained(tmp_path, StockDPOTrainer, loss_type="bco_pair")
    assert_same_numbers(none, stock)


@pytest.mark.parametrize("changes", [{"delta_kind": "ema"}, {"delta_value": 0.5}], ids=str)
def test_a_shift_without_the_loss_that_takes_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"a reward shift needs loss_type='bco_pair'; got .* with \['sigmoid'\]"):
        DPOConfig(str(tmp_path), **SETUPS["fp32"], **changes)


# Data.


def talks(rows: int = 8) -> list[dict[str, Any]]:
    """Conversations whose prompt is inside, and a column of it beside, as in UltraFeedback."""
    question = [[{"role": "user", "content": f"w{row} w2"}] for row in range(rows)]
    answers = [[{"role": "assistant", "content": f"w3{' w5' * (row % 3)}"}] for row in range(rows)]
    others = [[{"role": "assistant", "content": f"w{row + 9} w8"}] for row in range(rows)]
    columns = zip(question, answers, others, strict=True)
    return [{"prompt": one[0]["content"], "chosen": one + a, "rejected": one + b} for one, a, b in columns]


def test_conversations_and_streams(tmp_path: Path) -> None:
    """As TRL with explicit prompts; a text prompt beside conversations is left out, where TRL fails."""
    rows = [{name: value for name, value in row.items() if name != "prompt"} for row in talks()]
    data = IterableDataset.from_generator(lambda: iter(rows))
    ours = trained(tmp_path, options={"train_dataset": data, "eval_dataset": {"a": Dataset.from_list(rows[:4])}})
    stock = trained(tmp_path, StockDPOTrainer, options={"train_dataset": data})
    assert_same_numbers(ours, stock)
    assert ours.evaluate()["eval_a_loss"] > 0
    beside = trained(tmp_path, options={"train_dataset": Dataset.from_list(talks())})
    assert logged(beside)[0] == pytest.approx(logged(trained(tmp_path, options=implicit(rows)))[0], rel=1e-6)


def implicit(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"train_dataset": Dataset.from_list(rows)}


def test_pictures(tmp_path: Path) -> None:
    def picture(row: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (row * 30, 9, 200 - row * 20))

    rows = [
        {"prompt": talk["chosen"][:1], "chosen": talk["chosen"][1:], "rejected": talk["rejected"][1:]}
        for talk in talks()
    ]
    data = Dataset.from_list([{**row, "images": [picture(number)], "width": 0.5} for number, row in enumerate(rows)])
    options = {"train_dataset": data, "processing_class": llava_processor()}
    ours, stock = (
        trained(tmp_path, kind, options={**options, "model": llava(), "ref_model": llava()}, learning_rate=0.1)
        for kind in (DPOTrainer, StockDPOTrainer)
    )
    # Policy and reference are the same at first, where the sign of the rewards is that of the rounding.
    assert_same_numbers(ours, stock, 1e-3, but=("rewards/accuracies",))

    def wide(chosen: Any, rejected: Any, width: Tensor) -> Tensor:
        return -F.logsigmoid(BETA * difference(chosen, rejected) - width)

    own = trained(tmp_path, options={**options, "model": llava(), "ref_model": llava(), "objective": wide})
    assert logged(own)[0] == pytest.approx(float(F.softplus(torch.tensor(0.5))), rel=1e-4)
