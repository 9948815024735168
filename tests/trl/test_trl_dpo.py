"""The DPO trainer against TRL's on the same seed and data, with a reference that is another model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import set_seed
from trl.trainer.dpo_config import DPOConfig as StockDPOConfig
from trl.trainer.dpo_trainer import DPOTrainer as StockDPOTrainer
from trl_models import SETUPS, llama, mixtral, pairs, tokenizer
from trl_runs import UNTIMED, assert_same_run, flat

from fused_pref.trl import DPOTrainer
from fused_pref.trl.dpo_losses import NamedLoss, named_keywords, refusal

# Libraries warn of what is not ours to change.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
PROMPT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
BETA = 0.2
MICROBATCHES = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}


def reference() -> Any:
    return llama(seed=3)


def trained(
    kind: type,
    folder: Path,
    make: Any = llama,
    ref_model: Any = reference,
    options: dict[str, Any] | None = None,
    setup: str = "fp32",
    **changes: Any,
) -> Any:
    """A trainer after three steps."""
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 3}
    steps = {"learning_rate": 0.02, "optim": "sgd", "lr_scheduler_type": "constant", "beta": BETA}
    set_seed(0)
    trainer = kind(
        model=make(),
        ref_model=None if ref_model is None else ref_model(),
        args=StockDPOConfig(str(folder), **{**SETUPS[setup], **sizes, **steps, **changes}),
        train_dataset=pairs(),
        processing_class=tokenizer(),
        **(options or {}),
    )
    trainer.start = copy.deepcopy(trainer.model)
    trainer.train()
    return trainer


def assert_same(folder: Path, tolerance: float = 1e-4, *given: Any, **changes: Any) -> Any:
    ours, stock = (trained(kind, folder, *given, **changes) for kind in (DPOTrainer, StockDPOTrainer))
    more = {"nll_loss"} if "sft" in stock.loss_types else set()
    assert_same_run(ours, stock, tolerance, more=frozenset(more))
    assert ours.head
    assert len(ours.state.log_history[0].keys() & more) == len(more)
    return ours


NAMES = [
    *("sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),
    *("discopop", "sft", "aot", "aot_unpaired", "sigmoid_norm"),
]
DIVERGENT = ["sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm", "sft"]
WEIGHTS = [0.5 + 0.25 * number for number in range(len(DIVERGENT))]
# With label smoothing, which TRL's sigmoid has not.
CASES: list[dict[str, Any]] = [
    *({"loss_type": [name], "label_smoothing": 0.2} for name in NAMES),
    *(
        {"loss_type": DIVERGENT, "loss_weights": WEIGHTS, "label_smoothing": 0.1, "f_divergence_type": divergence}
        for divergence in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    ),
    {"loss_type": ["ipo", "sft"]},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.0, 1.0]},
    {"loss_type": ["sigmoid", "bco_pair", "ipo"], "use_weighting": True},
    {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.4},
    {"loss_type": ["sft"], "ld_alpha": 0.0},
    {"loss_type": ["nca_pair"], "ld_alpha": 0.3, "use_weighting": True},
]


DEFAULT = {"ld_alpha": None, "loss_weights": None, "label_smoothing": 0.0, "use_weighting": False}
DEFAULT |= {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.3}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Trainers before their first step; TRL's head computes for WPO, too."""
    folder = tmp_path_factory.mktemp("both")
    args = {"max_steps": 0, "use_weighting": True}
    return tuple(trained(kind, folder, **args) for kind in (DPOTrainer, StockDPOTrainer))  # type: ignore[return-value]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_losses(both: tuple[Any, Any], changes: dict[str, Any]) -> None:
    """Loss, gradient and metrics of two batches; rewards are of order one."""
    ours, _ = both
    # A new configuration would take the state of accelerate away from these trainers.
    args = copy.copy(ours.args)
    vars(args).update(DEFAULT | changes)
    names = ("ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing", "use_weighting")
    attributes: dict[str, Any] = {name: getattr(args, name) for name in names}
    attributes["loss_weights"] = args.loss_weights or [1.0] * len(args.loss_type)
    for trainer in both:
        vars(trainer).update(attributes, loss_types=args.loss_type)
    ours.loss = NamedLoss(named_keywords(args), args.use_weighting)
    batches = list(ours.get_train_dataloader())[:2]
    results = []
    for trainer in both:
        trainer._metrics["train"].clear()
        trainer.model.zero_grad()
        losses = [trainer.compute_loss(trainer.model, batch) for batch in batches]
        torch.stack(losses).sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
        results.append((torch.stack(losses).detach(), gradient, dict(trainer._metrics["train"])))
    (losses, gradient, metrics), (want, want_gradient, want_metrics) = results
    torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-6)
    assert (gradient - want_gradient).norm() <= 1e-5 * want_gradient.norm()
    assert want_gradient.norm() > 1e-2
    assert metrics.keys() - want_metrics.keys() == ({"nll_loss"} if "sft" in args.loss_type else set())
    for name, values in want_metrics.items():
        if name != "num_tokens":
            assert metrics[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
    assert max(map(abs, metrics["rewards/chosen"])) > 0.3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ld_alpha": 0.3, "loss_type": ["ipo", "sft"], "loss_weights": [2.0, 0.5], "precompute_ref_log_probs": True},
        {"use_weighting": True, "loss_type": ["nca_pair", "discopop"], "ld_alpha": 0.3, "discopop_tau": 0.5},
        {**MICROBATCHES, "loss_type": ["sigmoid", "bco_pair", "sft"]},
        {"gradient_checkpointing": True, "f_divergence_type": "forward_kl", "max_length": 7, "pad_to_multiple_of": 8},
        {"max_length": 6, "truncation_mode": "keep_end", "loss_type": "exo_pair", "label_smoothing": 0.1},
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    ],
    ids=str,
)
def test_options(tmp_path: Path, changes: dict[str, Any]) -> None:
    ours = assert_same(tmp_path, **changes)
    moved = not torch.equal(flat(ours.ref_model), flat(reference()))
    assert moved == changes.get("sync_ref_model", False)


def test_evaluation_and_uneven_batches(tmp_path: Path) -> None:
    """``compute_metrics`` gets logits; the last batch of an evaluation is smaller than the others."""
    seen: list[Any] = []
    options = {
        "eval_dataset": {"one": pairs(6), "other": pairs(5)},
        "compute_metrics": lambda result: seen.append(result.predictions[0]) or {"seen": float(len(seen))},
    }
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "loss_type": ["sigmoid", "sft"]}
    trained(DPOTrainer, tmp_path, options=options, **evaluation)
    mine = seen.copy()
    seen.clear()
    plain = {**options, "compute_metrics": None}
    ours = assert_same(tmp_path, options=plain, max_grad_norm=10.0, **evaluation)
    assert max(entry.get("eval_mean_token_accuracy", 0.0) for entry in ours.state.log_history) > 0.1
    trained(StockDPOTrainer, tmp_path, options=options, **evaluation)
    assert len(mine) == len(seen) == 2
    for got, want in zip(mine, seen, strict=True):
        assert got.shape[-1] == 66
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-4, atol=1e-4)


def adapted() -> Any:
    """A model whose adapter does something: its copy is the reference."""
    model = get_peft_model(llama(), LORA)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    ("make", "ref_model", "peft_config"),
    [(llama, reference, LORA), (llama, None, LORA), (adapted, None, None), (llama, None, PROMPT)],
    ids=["given", "without the adapter", "a copy of the adapter", "without the prompt"],
)
def test_adapters(tmp_path: Path, make: Any, ref_model: Any, peft_config: Any) -> None:
    options = {"peft_config": peft_config}
    ours = assert_same(tmp_path, 1e-3, make, ref_model, options, learning_rate=0.3, ld_alpha=0.5)
    assert 0 < sum(parameter.requires_grad for parameter in ours.model.parameters()) <= 8


def test_the_reference_is_loaded_by_the_name_of_the_model(tmp_path: Path) -> None:
    llama(seed=5).save_pretrained(tmp_path / "model")
    for changes in ({}, {"precompute_ref_log_probs": True}):
        runs = [
            trained(kind, tmp_path, lambda: str(tmp_path / "model"), None, learning_rate=0.1, **changes)
            for kind in (DPOTrainer, StockDPOTrainer)
        ]
        losses = [[entry["loss"] for entry in run.state.log_history[:3]] for run in runs]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert losses[1][2] != pytest.approx(losses[1][0], rel=1e-2)
        assert (runs[0].ref_model is None) == bool(changes)


def test_a_model_without_a_name_is_its_own_reference(tmp_path: Path) -> None:
    """Made from a configuration, not loaded: TRL finds no reference there."""
    with pytest.raises(OSError, match="Repo id"):
        trained(StockDPOTrainer, tmp_path, ref_model=None)
    ours = trained(DPOTrainer, tmp_path, ref_model=None)
    assert torch.equal(flat(ours.ref_model), flat(llama()))
    assert not torch.equal(flat(ours.model), flat(llama()))
    same = trained(DPOTrainer, tmp_path, ref_model=llama)
    assert ours.state.log_history[-2]["rewards/margins"] == same.state.log_history[-2]["rewards/margins"]


def test_mixture_of_experts(tmp_path: Path) -> None:
    ours = assert_same(tmp_path, make=mixtral, ref_model=mixtral, learning_rate=0.1)
    assert ours.state.log_history[0]["aux_loss"] > 1


def test_no_logits_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step with its reference, and in evaluation."""
    linear = torch.nn.functional.linear

    def checked(*args: Any) -> torch.Tensor:
        result = linear(*args)
        assert result.shape[-1] != 66 or result.dim() < 3, "logits"
        return result

    trainer = trained(DPOTrainer, tmp_path, max_steps=1, options={"eval_dataset": pairs(4)})
    monkeypatch.setattr(torch.nn.functional, "linear", checked)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(AssertionError, match="logits"):
        trainer.model(torch.tensor([[1, 2, 3]]))


# TRL rounds logits to bfloat16 under autocast, we do not; as in the tests of CPO, margins are differences of log-probs.
def test_defaults_in_bf16(tmp_path: Path) -> None:
    options: dict[str, Any] = {"setup": "defaults", "optim": "adamw_torch", "learning_rate": 1e-5}
    options["loss_type"] = ["sigmoid", "bco_pair", "sft"]
    ours, stock = (trained(kind, tmp_path, **options) for kind in (DPOTrainer, StockDPOTrainer))
    assert ours.args.bf16
    for mine, theirs in zip(ours.state.log_history, stock.state.log_history, strict=True):
        for name in theirs:
            if not name.endswith(UNTIMED):
                absolute = 0.02 if name.startswith(("rewards", "logits")) else 0.0
                assert mine[name] == pytest.approx(theirs[name], rel=2e-2, abs=absolute), name


def test_what_cannot_be_served_takes_trl_s_path(tmp_path: Path) -> None:
    """Of hyperparameters that TRL takes, one sentence says why."""
    changes = {"loss_type": ["robust", "sft"], "label_smoothing": 0.7}
    reason = r"TRL's own loss is used: label_smoothing must be .* for robust; got 0.7"
    with pytest.warns(UserWarning, match=reason) as warned:
        ours = trained(DPOTrainer, tmp_path, **changes)
    assert len([entry for entry in warned if "TRL's own loss" in str(entry.message)]) == 1
    assert not ours.head
    assert_same_run(ours, trained(StockDPOTrainer, tmp_path, **changes), 1e-6)
    args = StockDPOConfig(str(tmp_path), **{**SETUPS["fp32"], "beta": -0.1})
    assert refusal(named_keywords(args)) == "beta must be a finite number > 0; got -0.1"


def test_a_subclass_may_override_the_step(tmp_path: Path) -> None:
    class Own(DPOTrainer):
        def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super()._compute_loss(*args, **kwargs)

    ours, plain = (trained(kind, tmp_path, learning_rate=0.0) for kind in (Own, DPOTrainer))
    losses = [trainer.state.log_history[0]["loss"] for trainer in (ours, plain)]
    assert losses[0] == pytest.approx(2 * losses[1], rel=1e-6)
