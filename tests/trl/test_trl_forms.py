"""The forms of data that TRL's trainers take: the drop-in trains on the same tokens, BCO on those of TRL's KTO."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from transformers import set_seed
from trl import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl_models import SETUPS, TRAINING, llama, tokenizer, unpaired

import fused_pref as fp
from fused_pref.trl import BCOConfig, BCOTrainer, CPOTrainer
from fused_pref.trl.stock import StockCPOConfig, StockCPOTrainer

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
CALLS = (
    "{% for message in messages %}{{ message['role'] }} "
    "{% if message.get('content') is string %}{{ message['content'] }} "
    "{% elif message.get('content') %}{% for part in message['content'] %}{{ part['text'] }} {% endfor %}{% endif %}"
    "{% for call in message.get('tool_calls') or [] %}{{ call['function']['name'] }} {% endfor %}{{ eos_token }} "
    "{% endfor %}{% if tools %}{{ tools[0]['name'] }} {% endif %}{% if add_generation_prompt %}assistant {% endif %}"
)
ASKED = {"role": "user", "content": "w1 w2"}
GOOD, POOR = {"role": "assistant", "content": "w3 w4"}, {"role": "assistant", "content": "w5"}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "w7", "arguments": "{}"}}]}
TOOL = {"role": "tool", "content": "w6"}
PARTS = {"role": "assistant", "content": [{"type": "text", "text": "w8"}, {"type": "text", "text": "w9"}]}


def speaker() -> Any:
    changed = tokenizer()
    changed.chat_template = CALLS
    return changed


PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "w1 ", "chosen": "w2 w3", "rejected": "w4"},
    "texts without a prompt": {"chosen": "w1 w2 w3", "rejected": "w1 w4"},
    "messages": {"prompt": [ASKED], "chosen": [GOOD], "rejected": [POOR]},
    "messages without a prompt": {"chosen": [ASKED, GOOD], "rejected": [ASKED, POOR]},
    "a text prompt beside conversations": {"prompt": "w1 w2", "chosen": [ASKED, GOOD], "rejected": [ASKED, POOR]},
    "no prompt beside conversations": {"prompt": None, "chosen": [ASKED, GOOD], "rejected": [ASKED, POOR]},
    "a list as prompt beside conversations": {"prompt": ["w1"], "chosen": [ASKED, GOOD], "rejected": [ASKED, POOR]},
    "a tool call chosen": {"prompt": [ASKED], "chosen": [CALL], "rejected": [POOR]},
    "tool calls without a prompt": {"chosen": [ASKED, CALL, TOOL, GOOD], "rejected": [ASKED, CALL, TOOL, POOR]},
    "contents of parts": {"prompt": [ASKED], "chosen": [PARTS], "rejected": [PARTS]},
    "columns beside": {"chosen": [ASKED, GOOD], "rejected": [ASKED, POOR], "prompt_id": "a", "score_chosen": 8.5},
    "tools": {"prompt": [ASKED], "chosen": [CALL], "rejected": [POOR], "tools": [{"name": "w7"}]},
}
# In CPO alone, where TRL takes the prompt out of texts.
TEXTS_BESIDE_A_CONVERSATION = {"prompt": [ASKED], "chosen": "w1 w2 w3", "rejected": "w1 w4"}
SINGLES: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "w1 ", "completion": "w2 w3"},
    "messages": {"prompt": [ASKED], "completion": [GOOD]},
    "a tool call": {"prompt": [ASKED], "completion": [CALL]},
    "contents of parts": {"prompt": [ASKED], "completion": [PARTS]},
    "tools": {"prompt": [ASKED], "completion": [CALL], "tools": [{"name": "w7"}]},
    "tools as JSON": {"prompt": [ASKED], "completion": [CALL], "tools": json.dumps([{"name": "w7"}])},
    "variables of the template": {"prompt": [ASKED], "completion": [GOOD], "chat_template_kwargs": {"w": 1}},
}


# Rows that are the same tokens train alike: of the other forms, the rows are compared alone.
TRAINED = ("texts", "messages", "a tool call", "tools", "no prompt beside conversations")


def made(kind: type, args: Any, data: Any, **given: Any) -> Any:
    set_seed(0)
    return kind(model=llama(), args=args, train_dataset=data, processing_class=speaker(), **given)


def run(*given: Any, **more: Any) -> Any:
    trainer = made(*given, **more)
    trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PAIRS, "texts beside a conversation"])
def test_cpo(tmp_path: Path, name: str) -> None:
    data = Dataset.from_list([PAIRS.get(name, TEXTS_BESIDE_A_CONVERSATION)] * 4)
    options = {**TRAINING, "max_steps": 1, "per_device_train_batch_size": 4}
    ours, stock = (made(kind, StockCPOConfig(str(tmp_path), **options), data) for kind in (CPOTrainer, StockCPOTrainer))
    for column in [f"{side}_{part}" for side in ("chosen", "rejected") for part in ("input_ids", "labels")]:
        assert list(ours.train_dataset[column]) == list(stock.train_dataset[column])
    if name not in TRAINED:
        return
    ours.train()
    stock.train()
    assert ours.state.log_history[0]["loss"] == pytest.approx(stock.state.log_history[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("setup", SETUPS)
def test_cpo_of_both_forms_in_turn(tmp_path: Path, setup: str) -> None:
    """TRL decides row by row where the prompt is."""
    with_prompt = {"prompt": [ASKED], "chosen": [GOOD], "rejected": [POOR]}
    data = Dataset.from_list([with_prompt, {**PAIRS["messages without a prompt"], "prompt": None}] * 2)
    trainer = run(CPOTrainer, StockCPOConfig(str(tmp_path), **SETUPS[setup], max_steps=1), data)
    assert len({tuple(row) for row in trainer.train_dataset["chosen_labels"]}) == 1


def options_of_bco(**changes: Any) -> dict[str, Any]:
    return {**TRAINING, "max_steps": 1, "per_device_train_batch_size": 8, **changes}


def assert_same_rows(ours: Any, stock: Any) -> None:
    for column in ("prompt_ids", "completion_ids", "label"):
        assert list(ours.train_dataset[column]) == list(stock.train_dataset[column])


def assert_same_step(ours: Any, stock: Any) -> None:
    for name in ("logps/chosen", "logps/rejected"):
        assert ours.state.log_history[0][name] == pytest.approx(stock.state.log_history[0][name], rel=1e-5)
    assert ours.state.log_history[0]["loss"] == pytest.approx(0.6931472, rel=1e-5)


def stock_kto(folder: Path, data: Any) -> Any:
    args = KTOConfig(str(folder), loss_type="apo_zero_unpaired", **options_of_bco())
    return made(KTOTrainer, args, data, ref_model=llama())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "paired"), [*((name, False) for name in SINGLES), *((name, True) for name in PAIRS)])
def test_bco(tmp_path: Path, name: str, paired: bool) -> None:
    rows = [PAIRS[name]] * 4 if paired else [{**SINGLES[name], "label": number % 3 != 1} for number in range(8)]
    data = Dataset.from_list(rows)
    ours = made(BCOTrainer, BCOConfig(str(tmp_path), **options_of_bco()), data)
    if name.endswith("beside conversations"):  # KTO's chat template fails; the prompt is that of the conversations
        data = Dataset.from_list([PAIRS["messages without a prompt"]] * 4)
    stock = stock_kto(tmp_path, data)
    assert_same_rows(ours, stock)
    if name in TRAINED:
        ours.train()
        stock.train()
        assert_same_step(ours, stock)


def numbers(values: list[Any]) -> Dataset:
    rows = unpaired(8)
    features = Features({**rows.features, "label": Value("float32")}) if isinstance(values[0], float) else None
    return Dataset.from_list([{**row, "label": v} for row, v in zip(rows, values, strict=True)], features=features)


def classes() -> Dataset:
    kind = ClassLabel(names=["bad", "good"])
    return numbers([1, 0] * 4).cast_column("label", kind)


LABELS = {
    "booleans": lambda: numbers([True, False] * 4),
    "integers": lambda: numbers([1, 0] * 4),
    "floats": lambda: numbers([1.0, 0.0] * 4),
    "names of classes": classes,
    "NumPy's booleans": lambda: numbers([True, False] * 4).with_format("numpy"),
    "tensors": lambda: numbers([1, 0] * 4).with_format("torch"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "setup"), [*((name, "fp32") for name in sorted({*LABELS} - {"booleans"})), ("tensors", "defaults")]
)
def test_labels(tmp_path: Path, name: str, setup: str) -> None:
    """With weights of prompts, which tell the classes apart too."""
    mine, weights = labelled(tmp_path, LABELS[name](), setup)
    want, expected_weights = with_booleans(setup, tmp_path)
    for got, expected in zip(mine, want, strict=True):
        for key in ("loss", "eval_loss", "logps/chosen", "eval_rewards/rejected", "eval_good"):
            assert got.get(key) == expected.get(key)
    assert weights == expected_weights


def labelled(folder: Path, data: Dataset, setup: str) -> tuple[list[dict[str, float]], list[float]]:
    """What a run logs, and its weights."""
    options = options_of_bco(max_steps=2, **({"bf16": True} if setup == "defaults" else {}))
    given = {"embedding_func": lambda texts: [[float(len(text)), float(text[1])] for text in texts]}
    args = BCOConfig(str(folder), **options)
    trainer = run(BCOTrainer, args, data, eval_dataset=data, compute_metrics=_seen, **given)
    trainer.evaluate()
    return trainer.state.log_history, list(trainer.train_dataset["sample_weight"])


BOOLEANS: dict[str, tuple[list[dict[str, float]], list[float]]] = {}


def with_booleans(setup: str, folder: Path) -> tuple[list[dict[str, float]], list[float]]:
    """The run that the others are held against, made once."""
    if setup not in BOOLEANS:
        BOOLEANS[setup] = labelled(folder, LABELS["booleans"](), setup)
    return BOOLEANS[setup]


def _seen(result: Any) -> dict[str, float]:
    return {"good": float(np.asarray(result.label_ids).sum())}


@pytest.mark.parametrize("label", [2, -1, 0.5, "yes", None])
def test_labels_that_are_none(tmp_path: Path, label: Any) -> None:
    """A conversion to bool would take -1 for desirable."""
    rows = [{**row, "label": type(label)(1) if label is not None else True} for row in unpaired(8)]
    if isinstance(label, str):
        rows = [{**row, "label": "1"} for row in rows]
    rows[5]["label"] = label
    args = BCOConfig(str(tmp_path / "out"), **options_of_bco())
    match = r"train_dataset\[\d\]\['label'\] must be true or false, or 1 or 0; got"
    with pytest.raises(ValueError, match=match):
        run(BCOTrainer, args, Dataset.from_list(rows))
    if not isinstance(label, str):  # a stream shows its rows one by one
        with pytest.raises(ValueError, match="the label of a row must be true or false, or 1 or 0; got"):
            run(BCOTrainer, args, Dataset.from_list(rows).to_iterable_dataset())


# Weights of prompts.

EMBEDDINGS = {
    "a NumPy array": lambda texts: np.array([[len(t), t.count("1")] for t in texts], dtype=np.float32),
    "an array that cannot be written": lambda texts: _frozen([[len(t), t.count("1")] for t in texts]),
    "float64": lambda texts: np.array([[len(t), t.count("1")] for t in texts], dtype=np.float64),
    "float16": lambda texts: np.array([[len(t), t.count("1")] for t in texts], dtype=np.float16),
    "lists": lambda texts: [[float(len(t)), float(t.count("1"))] for t in texts],
    "a list of arrays": lambda texts: [np.array([len(t), t.count("1")], dtype=np.float32) for t in texts],
    "a list of tensors": lambda texts: [torch.tensor([len(t), t.count("1")]).float() for t in texts],
    "a tensor with a gradient": lambda texts: (
        torch.tensor([[len(t), t.count("1")] for t in texts]).float().requires_grad_()
    ),
}


def _frozen(rows: list[Any]) -> np.ndarray:
    array = np.array(rows, dtype=np.float32)
    array.setflags(write=False)
    return array


def weights_by(function: Any, folder: Path) -> list[float]:
    trainer = BCOTrainer(
        llama(),
        args=BCOConfig(str(folder), **options_of_bco()),
        train_dataset=unpaired(),
        processing_class=speaker(),
        embedding_func=function,
    )
    return list(trainer.train_dataset["sample_weight"])


PLAIN: list[float] = []


def weights_by_tensors(folder: Path) -> list[float]:
    """Those that the others are held against, made once."""

    def plain(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[float(len(text)), float(text.count("1"))] for text in texts])

    PLAIN[:] = PLAIN or weights_by(plain, folder)
    return PLAIN


@pytest.mark.filterwarnings("error:.*(slow|writ):UserWarning")
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings(tmp_path: Path, name: str) -> None:
    mine, want = weights_by(EMBEDDINGS[name], tmp_path), weights_by_tensors(tmp_path)
    assert mine == want
    assert len(set(want)) > 2
    rows = unpaired()
    ratio = fp.DensityRatio().fit(EMBEDDINGS[name](rows["prompt"]), np.array(rows["label"]))
    weights = ratio(EMBEDDINGS[name](rows["prompt"]), list(rows["label"]))
    torch.testing.assert_close(weights, torch.tensor(list(want)))


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS)
def test_a_stream_is_evaluated_with_weights(tmp_path: Path, setup: str) -> None:
    args = BCOConfig(str(tmp_path), **{**SETUPS[setup], "max_steps": 1, "per_device_eval_batch_size": 3})
    streams = {"rows": unpaired(10), "stream": unpaired(10).to_iterable_dataset()}
    trainer = run(BCOTrainer, args, unpaired(), eval_dataset=streams, embedding_func=EMBEDDINGS["lists"])
    trainer.evaluate()
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert logged["eval_stream_loss"] == pytest.approx(logged["eval_rows_loss"], rel=1e-6)
    assert isinstance(trainer.eval_dataset["stream"], IterableDataset)
    assert (
        next(iter(trainer.eval_dataset["stream"]))["sample_weight"] == trainer.eval_dataset["rows"][0]["sample_weight"]
    )


@pytest.mark.parametrize("setup", SETUPS)
def test_a_stream_is_trained_on(tmp_path: Path, setup: str) -> None:
    args = BCOConfig(str(tmp_path), **{**SETUPS[setup], "max_steps": 2})
    trainer = run(BCOTrainer, args, unpaired().to_iterable_dataset(), eval_dataset=unpaired(4).to_iterable_dataset())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931472, rel=2e-3)
    assert trainer.evaluate()["eval_loss"] > 0.5
