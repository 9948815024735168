"""Training on several processes against one: the trainers, FSDP2, exact normalisation, and rows without padding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Raised, run_ranks
from shared import once
from trl_models import TRAINING, llama, pairs, sharp, tokenizer, unpaired

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
TRAINERS = ("cpo", "bco", "kto", "dpo")
MIXTURE = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
# A step of two ranks is one of 8 rows, an evaluation batch is one of 6.
HALVES = {
    "ddp_backend": "gloo",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 3,
}
WHOLE = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 6}
# Steps of 8 and of 5 rows, of which the second rank has none in the last microbatch; evaluation ends with one row.
ROWS = 13
# They count the padding, which depends on how rows are put together; TRL's CPO takes means of logits over it, too.
OF_PADDING = ("total_flos",)
OF_PADDED_LOGITS = [f"{prefix}logits/{side}" for prefix in ("", "eval_") for side in ("chosen", "rejected")]
OPTIONS = {**TRAINING, "max_steps": 2, "learning_rate": 0.05, "optim": "sgd"}


def _train(kind: str, folder: str, **changes: Any) -> dict[str, Any]:
    """Logged numbers and the parameters after the run."""
    from trl import DPOTrainer as StockDPOTrainer
    from trl import KTOTrainer as StockKTOTrainer

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
    from fused_pref.trl.stock import StockCPOTrainer

    # With a reference of its own, completions of other prompts are likelier under the policy.
    trainer_class, config, data, reference = {
        "cpo": (CPOTrainer, CPOConfig, pairs, {}),
        "stock cpo": (StockCPOTrainer, CPOConfig, pairs, {}),
        "bco": (BCOTrainer, BCOConfig, unpaired, {"ref_model": sharp()}),
        "kto": (KTOTrainer, KTOConfig, unpaired, {"ref_model": sharp()}),
        "stock kto": (StockKTOTrainer, KTOConfig, unpaired, {"ref_model": sharp()}),
        "dpo": (DPOTrainer, DPOConfig, pairs, {"ref_model": sharp()}),
        "stock dpo": (StockDPOTrainer, DPOConfig, pairs, {"ref_model": sharp()}),
    }[kind]
    args = config(folder, **{**OPTIONS, **changes, **(MIXTURE if config is DPOConfig else {})})
    given = {"train_dataset": data(ROWS), "eval_dataset": data(ROWS), "processing_class": tokenizer(), **reference}
    trainer: Any = trainer_class(model=llama(), args=args, **given)
    trainer.train()
    evaluation = trainer.evaluate()
    assert trainer.args.padding_free == changes.get("padding_free", False)
    parameters = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    shift = trainer.reward_shift.state_dict() if kind == "bco" else {}
    return {"log": trainer.state.log_history, "eval": evaluation, "parameters": parameters, "shift": shift}


# Whether the head is wrapped by itself, and whether it is tied.
SHARDED = ((True, False), (False, True))


def train_all(rank: int, folder: str) -> dict[str, Any]:
    sharded = {kind: train_sharded(rank, 2, *kind) for kind in SHARDED}
    runs = {kind: _train(kind, folder, **HALVES) for kind in (*TRAINERS, "stock cpo", "stock kto", "stock dpo")}
    for name, option in {"exact": "exact_accumulation", "packed": "padding_free"}.items():
        runs |= {f"{name} {kind}": _train(kind, folder, **{option: True}, **HALVES) for kind in TRAINERS}
    return {**runs, "sharded": sharded}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """In one go: starting them takes time."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    ranks = once("training on 2 ranks", lambda: run_ranks(2, train_all, folder))
    assert not any(isinstance(rank, Raised) for rank in ranks), ranks
    return ranks


def numbers(run: dict[str, Any]) -> list[dict[str, float]]:
    untimed = ("runtime", "per_second")
    return [{key: value for key, value in entry.items() if not key.endswith(untimed)} for entry in run["log"]]


@pytest.mark.slow
def test_ranks_agree(two_ranks: list[dict[str, Any]]) -> None:
    first, second = two_ranks
    for name in first.keys() - {"sharded"}:
        assert torch.equal(first[name]["parameters"], second[name]["parameters"]), name
        for key, value in first[name]["shift"].items():
            assert torch.equal(second[name]["shift"][key], value)


@pytest.mark.parametrize("kind", ["cpo", "kto", "dpo"])
def test_two_processes_log_what_trl_s_trainer_logs(two_ranks: list[dict[str, Any]], kind: str) -> None:
    ours, stock = numbers(two_ranks[0][kind]), numbers(two_ranks[0][f"stock {kind}"])
    assert len(ours) == len(stock) == 4
    for mine, theirs in zip(ours, stock, strict=True):
        more = {"nll_loss", "eval_nll_loss"} if kind == "dpo" else set()
        assert {name: value for name, value in mine.items() if name not in more} == pytest.approx(
            theirs, rel=1e-4, abs=1e-5
        )
    assert kind != "kto" or ours[0]["kl"] > 0.1


def assert_same(ours: dict[str, Any], other: dict[str, Any], kind: str) -> None:
    torch.testing.assert_close(ours["parameters"], other["parameters"], rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(numbers(ours), numbers(other), strict=True):
        for name in theirs:
            if name not in (*OF_PADDING, *(OF_PADDED_LOGITS if kind == "cpo" else ())):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
        assert mine.keys() == theirs.keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
def test_rows_without_padding_on_two_ranks(two_ranks: list[dict[str, Any]], kind: str) -> None:
    """With repeats in the last batches, which BCO leaves out of evaluation."""
    for rank in two_ranks:
        assert_same(rank[f"packed {kind}"], rank[kind], kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
def test_exact_accumulation_on_two_ranks_is_one_process(
    two_ranks: list[dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    """Every number that is logged, in training and in evaluation."""
    one, ours = _train(kind, str(tmp_path), **WHOLE), two_ranks[0][f"exact {kind}"]
    assert_same(ours, one, kind)
    if kind == "kto":
        assert ours["log"][0]["kl"] > 0.1
    if kind == "bco":
        assert int(ours["shift"]["count"].sum()) == int(one["shift"]["count"].sum()) == ROWS
        torch.testing.assert_close(ours["shift"]["mean"], one["shift"]["mean"])


@pytest.mark.slow
def test_averages_of_microbatches_are_not_one_process(two_ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    one = _train("cpo", str(tmp_path), **WHOLE)
    different = (two_ranks[0]["cpo"]["parameters"] - one["parameters"]).norm()
    assert different > 100 * (two_ranks[0]["exact cpo"]["parameters"] - one["parameters"]).norm()


# FSDP2, with a loop of one's own.


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(3):
        input_ids = torch.randint(3, 66, (8, 9), generator=generator)
        labels = input_ids.clone()
        labels[:, :4] = -100
        labels[2:5, 6:] = -100
        made.append({"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(input_ids)})
    return made


def train_sharded(rank: int, world: int, wrap_head: bool, tied: bool) -> tuple[list[float], torch.Tensor]:
    """Losses and whole parameters; each rank has its share of the pairs, normalised by all of them."""
    import fused_pref as fp
    from fused_pref.models import preference as models

    model = llama(tie_word_embeddings=tied)
    models.attach(model)
    if world > 1:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        if wrap_head:
            fully_shard(model.lm_head)
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for batch in batches():
        chosen = batch["labels"][:4, 1:]
        rows = [row for half in (0, 4) for row in range(half + rank * 4 // world, half + (rank + 1) * 4 // world)]
        mine = {name: value[rows] for name, value in batch.items()}
        # FSDP averages the gradients of the ranks.
        normalizers = {"pair_normalizer": 4 / world, "token_normalizer": int((chosen != -100).sum()) / world}
        output = models.preference_forward(model, {**mine, **normalizers}, fp.LinearCPOLoss())
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    whole = [getattr(p, "full_tensor", lambda p=p: p)().detach().flatten() for p in model.parameters()]
    return losses, torch.cat(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARDED)
def test_fsdp2_is_one_process(kind: tuple[bool, bool], two_ranks: list[dict[str, Any]]) -> None:
    losses, parameters = train_sharded(0, 1, *kind)
    (first, mine), (second, theirs) = (found["sharded"][kind] for found in two_ranks)
    assert torch.equal(mine, theirs)
    torch.testing.assert_close(mine, parameters, rtol=1e-5, atol=1e-6)
    assert [(a + b) / 2 for a, b in zip(first, second, strict=True)] == pytest.approx(losses, rel=1e-5)
