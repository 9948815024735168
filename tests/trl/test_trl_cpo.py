"""The CPO trainer against TRL's on the same seed and data, and what it adds."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, set_seed
from trl_models import DEFAULTS, SETUPS, bart, llama, mixtral, pairs, t5, tokenizer
from trl_runs import UNTIMED, assert_same_run

from benchmarks.measure import peak_bytes
from fused_pref.trl import CPOConfig, CPOTrainer
from fused_pref.trl.stock import StockCPOConfig, StockCPOTrainer

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(params=SETUPS)
def setup(request: pytest.FixtureRequest) -> str:
    """As a user trains, with the trainer's defaults; and in float32."""
    return request.param


def config(folder: Path, kind: type = StockCPOConfig, setup: str = "fp32", **changes: Any) -> Any:
    options = {
        **SETUPS[setup],
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 0.05,
        "optim": "sgd",  # Adam makes steps of the rounding where a gradient is 0
        "eval_strategy": "steps",
        "eval_steps": 2,
        **changes,
    }
    return kind(str(folder), **options)


def trained(
    kind: type,
    folder: Path,
    make: Any = llama,
    options: dict[str, Any] | None = None,
    eval_dataset: Any = None,
    train_dataset: Any = None,
    **changes: Any,
) -> Any:
    """A trainer after its steps."""
    set_seed(0)
    trainer = kind(
        model=make(),
        args=config(folder, **changes),
        train_dataset=train_dataset or pairs(),
        eval_dataset=eval_dataset or pairs(6),
        processing_class=tokenizer(),
        **(options or {}),
    )
    trainer.start = copy.deepcopy(trainer.model)
    trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 4},
        {"cpo_alpha": 0.0, "gradient_checkpointing": True},
        {"cpo_alpha": 0.5, "label_smoothing": 0.1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"loss_type": "simpo", "simpo_gamma": 0.3},
        {"loss_type": "ipo", "cpo_alpha": 0.5},
        {"loss_type": "hinge", "gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
        {"loss_type": "alphapo", "alpha": 0.2},
    ],
    ids=str,
)
def test_run_is_that_of_trl(tmp_path: Path, changes: dict[str, Any]) -> None:
    ours, stock = (trained(kind, tmp_path, **changes) for kind in (CPOTrainer, StockCPOTrainer))
    assert_same_run(ours, stock, tolerance=2e-5)
    assert ours.head


@pytest.mark.slow
@pytest.mark.parametrize("make", [mixtral, t5, bart])
def test_models(tmp_path: Path, make: Any) -> None:
    changes = {"max_completion_length": 8} if make in (t5, bart) else {}
    ours, stock = (trained(kind, tmp_path, make, **changes) for kind in (CPOTrainer, StockCPOTrainer))
    assert ours.aux_loss_enabled == (make is mixtral)
    assert_same_run(ours, stock, tolerance=2e-5)


@pytest.mark.slow
def test_lora(tmp_path: Path) -> None:
    options = {"peft_config": LORA}
    ours, stock = (
        trained(kind, tmp_path, options=options, learning_rate=1e-2) for kind in (CPOTrainer, StockCPOTrainer)
    )
    assert_same_run(ours, stock, tolerance=2e-4)
    assert sum(parameter.requires_grad for parameter in ours.model.parameters()) == 8


# TRL rounds the logits to bfloat16, to 8 bits, and we do not. The errors of single log-probs, up to 2^-9 of the logits,
# are independent, and average out over the hundreds of tokens of a batch and the sums of tens in a sequence. Where the
# gradients differ by so little, Adam's steps do too, unless a gradient is about 0; so the parameters are not compared.
BF16 = {"loss": 2e-3, "nll_loss": 2e-3, "logps": 2e-3, "rewards": 2e-3, "grad_norm": 2e-2, "logits": 2e-3}


def assert_same_numbers(ours: Any, stock: Any) -> None:
    """All logged numbers, within what bfloat16 can hold."""
    assert ours.args.bf16
    assert len(ours.state.log_history) == len(stock.state.log_history) > 4
    for mine, theirs in zip(ours.state.log_history, stock.state.log_history, strict=True):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            if name.endswith(UNTIMED):
                continue
            relative = BF16.get(name.removeprefix("eval_").split("/")[0], 1e-6)
            # Margins are differences of log-probs of up to 200, times beta = 0.1.
            absolute = 0.02 if "rewards" in name else 2e-3
            assert mine[name] == pytest.approx(theirs[name], rel=relative, abs=absolute), name


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, mixtral, t5], ids=["llama", "mixtral", "t5"])
def test_bf16_autocast(tmp_path: Path, make: Any) -> None:
    options = {"setup": "defaults", "optim": "adamw_torch", "learning_rate": 1e-5, "max_steps": 4}
    options |= {"max_completion_length": 8} if make is t5 else {}
    assert_same_numbers(*(trained(kind, tmp_path, make, **options) for kind in (CPOTrainer, StockCPOTrainer)))


ENGLISH = [
    ("Which planet is the largest?", "Jupiter is the largest planet of the solar system.", "The moon, I think."),
    ("Translate into French: good morning.", "Bonjour.", "Guten Morgen, which is what one says in Berlin."),
    ("Why is the sky blue?", "Air scatters short wavelengths of sunlight more than long ones.", "Because it is."),
    ("Name a prime number above ten.", "Eleven is one.", "Twelve, fourteen and fifteen are prime numbers."),
    ("Who wrote Hamlet?", "William Shakespeare wrote it around the year 1600.", "Hamlet was written by Hamlet."),
    ("How do I boil an egg?", "Put it into boiling water for eight minutes, then cool it.", "Ask your mother."),
    ("What does HTTP stand for?", "Hypertext Transfer Protocol.", "It stands for a web page with a padlock."),
    ("Is glass a liquid?", "No; it is an amorphous solid, whatever one reads about old windows.", "Yes, it flows."),
]


def english() -> Dataset:
    columns = ("prompt", "chosen", "rejected")
    return Dataset.from_list([dict(zip(columns, row, strict=True)) for row in ENGLISH])


def reader() -> Any:
    """Each printable character of ASCII is a token."""
    vocabulary = {text: number for number, text in enumerate(["<pad>", "<s>", "</s>", *map(chr, range(32, 127))])}
    core = Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"learning_rate": 1e-3}], ids=str)
def test_the_defaults_of_both_give_the_same_numbers_on_english(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Every field of the configuration that computes something is at its default, bf16 and AdamW included; again with
    steps that are seen in the numbers."""
    runs = []
    for kind in (CPOTrainer, StockCPOTrainer):
        set_seed(0)
        args = StockCPOConfig(str(tmp_path), num_train_epochs=6, **DEFAULTS, **changes)
        model = llama(vocab_size=98, max_position_embeddings=128)
        given = {"train_dataset": english(), "eval_dataset": english(), "processing_class": reader()}
        runs.append(kind(model=model, args=args, **given))
        runs[-1].train()
        runs[-1].evaluate()
    ours, stock = runs
    assert args.gradient_checkpointing
    assert args.per_device_train_batch_size == 8
    assert len(ours.train_dataset[0]["chosen_input_ids"]) > 70
    assert_same_numbers(ours, stock)
    first, last = (ours.state.log_history[step]["loss"] for step in (0, 5))
    assert first - last > (1.0 if changes else 0.0)


@pytest.mark.slow
def test_no_logits_are_made(tmp_path: Path, setup: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(CPOTrainer, tmp_path, max_steps=1, eval_strategy="no", setup=setup)
    monkeypatch.setattr(torch.nn.functional, "linear", _without_vocabulary(torch.nn.functional.linear))
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    loss.backward()
    assert loss.item() > 0
    assert len(metrics) == 9
    with pytest.raises(AssertionError, match="logits"):
        trainer.model(batch["chosen_input_ids"])


def _without_vocabulary(linear: Any) -> Any:
    def checked(*args: Any) -> torch.Tensor:
        result = linear(*args)
        assert result.shape[-1] != 66, "logits"
        return result

    return checked


@pytest.mark.slow
def test_generation_is_unchanged(tmp_path: Path, setup: str) -> None:
    trainer = trained(CPOTrainer, tmp_path, max_steps=1, eval_strategy="no", setup=setup)
    fresh = llama()
    fresh.load_state_dict(trainer.model.state_dict())
    prompt = torch.tensor([[1, 9, 17]])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(trainer.model.eval().generate(prompt, **options), fresh.eval().generate(prompt, **options))


@pytest.mark.slow
def test_exact_accumulation_is_one_big_batch(tmp_path: Path, setup: str) -> None:
    """The gradient of microbatches of different lengths is that of all of them at once; TRL's is not."""
    big, exact, means = (
        trained(kind, tmp_path, max_steps=1, eval_strategy="no", options=options, learning_rate=0, setup=setup, **sizes)
        for kind, options, sizes in (
            (StockCPOTrainer, {}, {"per_device_train_batch_size": 8}),
            (CPOTrainer, {"exact_accumulation": True}, MICROBATCHES),
            (CPOTrainer, {}, MICROBATCHES),
        )
    )
    close = 1e-2 if setup == "defaults" else 1e-5
    norm = big.state.log_history[0]["grad_norm"]
    assert exact.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=close)
    assert exact.state.log_history[0]["loss"] == pytest.approx(big.state.log_history[0]["loss"], rel=close)
    assert means.state.log_history[0]["grad_norm"] != pytest.approx(norm, rel=max(close, 1e-3))


MICROBATCHES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def test_exact_accumulation_comes_from_the_configuration_too(tmp_path: Path) -> None:
    arguments = {"train_dataset": pairs(), "processing_class": tokenizer()}
    args = config(tmp_path, CPOConfig, exact_accumulation=True, memory_budget=2**28, eval_strategy="no")
    trainer = CPOTrainer(model=llama(), args=args, **arguments)
    assert (trainer.exact_accumulation, trainer.memory_budget) == (True, 2**28)
    trainer = CPOTrainer(model=llama(), args=args, exact_accumulation=False, **arguments)
    assert not trainer.exact_accumulation
    assert not CPOTrainer(model=llama(), args=config(tmp_path, eval_strategy="no"), **arguments).exact_accumulation


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpo_loss", "get_batch_logps", "concatenated_forward"])
def test_a_subclass_with_its_own_loss_gets_trl_s_path(tmp_path: Path, name: str) -> None:
    calls = []

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return getattr(StockCPOTrainer, name)(*args, **kwargs)

    own = staticmethod(lambda *args, **kwargs: step(None, *args, **kwargs)) if name == "get_batch_logps" else None

    def bound(self: Any, *args: Any, **kwargs: Any) -> Any:
        return step(self, self, *args, **kwargs)

    kind = type("Own", (CPOTrainer,), {name: own or bound})
    with pytest.warns(UserWarning, match=f"overrides {name}"):
        ours = trained(kind, tmp_path, max_steps=2, eval_strategy="no", logging_steps=1)
    stock = trained(StockCPOTrainer, tmp_path, max_steps=2, eval_strategy="no")
    assert calls
    assert not ours.head
    assert ours.state.log_history[0]["loss"] == pytest.approx(stock.state.log_history[0]["loss"], rel=1e-6)


@pytest.mark.slow
def test_several_datasets_are_evaluated(tmp_path: Path) -> None:
    """A ``DatasetDict``: the only dictionary that TRL's trainer can map."""
    parts = DatasetDict({"short": pairs(4), "long": pairs(6)})
    ours, stock = (trained(kind, tmp_path, eval_dataset=parts) for kind in (CPOTrainer, StockCPOTrainer))
    assert_same_run(ours, stock, tolerance=2e-5)
    logged = {name for entry in ours.state.log_history for name in entry}
    assert {"eval_short_loss", "eval_long_loss"} <= logged


@pytest.mark.slow
def test_evaluation_with_compute_metrics_reads_the_logits_means(tmp_path: Path, setup: str) -> None:
    seen = []
    options = {"compute_metrics": lambda result: seen.append(result.predictions) or {"seen": 1.0}}
    trainer = trained(CPOTrainer, tmp_path, options=options, max_steps=2, setup=setup)
    (predictions,) = seen
    assert len(predictions) == 4  # chosen and rejected, of two batches
    logged = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert logged["eval_logits/chosen"] == pytest.approx(float(predictions[0] + predictions[2]) / 2, rel=1e-6)
    assert math.isfinite(logged["eval_loss"])


@pytest.mark.slow
def test_a_conversation_is_templated(tmp_path: Path, setup: str) -> None:
    question = {"role": "user", "content": "w1 w2"}
    answers = [{"chosen": "w3", "rejected": "w4 w5"}, {"chosen": "w6 w7", "rejected": "w8"}]
    data = Dataset.from_list(
        [
            {side: [question, {"role": "assistant", "content": text}] for side, text in row.items()}
            for row in answers * 4
        ]
    )
    args = config(tmp_path, max_steps=2, eval_strategy="no", setup=setup)
    trainer = CPOTrainer(model=llama(), args=args, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    assert trainer.train_dataset[0]["prompt"].startswith("user w1")
    assert trainer.state.log_history[0]["loss"] > 0


@pytest.mark.slow
def test_peak_memory_of_a_step_is_at_most_half_of_trl_s(tmp_path: Path) -> None:
    """With a vocabulary of 131,072; gradients counted, parameters not."""
    peaks = []
    for kind in (CPOTrainer, StockCPOTrainer):
        args = config(tmp_path, per_device_train_batch_size=8, eval_strategy="no")
        model = llama(vocab_size=131_072, hidden_size=64)
        trainer = kind(model=model, args=args, train_dataset=pairs(), processing_class=tokenizer())
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        peaks.append(
            peak_bytes(lambda trainer=trainer, batch=batch: trainer.compute_loss(trainer.model, batch).backward())
        )
        assert trainer.model.lm_head.weight.grad.isfinite().all()
    logits = 16 * max(batch["chosen_input_ids"].shape[1], batch["rejected_input_ids"].shape[1]) * 131_072 * 4
    assert peaks[1] > 2 * logits
    assert peaks[0] <= peaks[1] / 2
