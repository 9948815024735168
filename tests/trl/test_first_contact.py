"""Situations that people meet in their first hour with the trainers, each with the defaults of the configuration.

They are told as their users tell them in bug reports of trainers of this kind, and do not follow the code.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, set_seed
from trl_models import DEFAULTS, llama, pairs, tokenizer, unpaired

from fused_pref.trl import BCOConfig, BCOTrainer, CPOConfig, CPOTrainer

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
KINDS: dict[str, tuple[Any, Any, Any]] = {
    "cpo": (CPOTrainer, CPOConfig, pairs),
    "bco": (BCOTrainer, BCOConfig, unpaired),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def made(kind: str, folder: Path, data: Any = None, options: dict[str, Any] | None = None, **changes: Any) -> Any:
    set_seed(0)
    trainer, config, rows = KINDS[kind]
    given = {"model": llama(), "processing_class": tokenizer(), **(options or {})}
    args = config(str(folder / "out"), **{**DEFAULTS, "max_steps": 2, "per_device_train_batch_size": 4, **changes})
    return trainer(args=args, train_dataset=rows(8) if data is None else data, **given)


def trained(*given: Any, **changes: Any) -> Any:
    trainer = made(*given, **changes)
    trainer.train()
    assert all(torch.tensor(loss).isfinite() for loss in losses(trainer))
    return trainer


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[float]]:
    """Losses of the usual run, made once."""
    return functools.cache(lambda kind: losses(trained(kind, tmp_path_factory.mktemp(kind))))


def losses(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.slow
def test_the_trainer_is_made_from_two_lines(kind: str, tmp_path: Path) -> None:
    trainer = trained(kind, tmp_path)
    assert trainer.args.bf16
    assert len(losses(trainer)) == 2


@pytest.mark.slow
def test_a_tokenizer_like_that_of_gpt2_has_no_pad_token(kind: str, usual: Any, tmp_path: Path) -> None:
    """Padding is masked, so the token that pads does not matter."""
    alone = trained(kind, tmp_path, options={"processing_class": tokenizer(pad_token=None)})
    assert alone.processing_class.pad_token == "</s>"
    assert losses(alone) == usual(kind)


def test_the_data_are_in_the_form_of_sharegpt(kind: str, tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
    rows = Dataset.from_list([{"chosen": talk, "rejected": talk}])
    with pytest.raises(ValueError, match=r"\['chosen'\] must be a text or a list of messages; got .*has no role"):
        made(kind, tmp_path, rows)


def test_all_splits_are_given_instead_of_one(kind: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"train_dataset must be a datasets\.Dataset.*; got DatasetDict"):
        made(kind, tmp_path, DatasetDict({"train": KINDS[kind][2](4)}))


@pytest.mark.slow
def test_rows_come_from_a_file_of_json_lines(kind: str, usual: Any, tmp_path: Path) -> None:
    """Labels are numbers there, and there are columns that nobody asked for."""
    rows = [{**row, "id": number, "source": None} for number, row in enumerate(KINDS[kind][2](8))]
    rows = [{**row, "label": int(row["label"])} if "label" in row else row for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path), split="train")
    assert losses(trained(kind, tmp_path, data)) == usual(kind)


def test_rows_come_from_pandas(kind: str, tmp_path: Path) -> None:
    frame = KINDS[kind][2](12).to_pandas()
    data = Dataset.from_pandas(frame[frame.index % 3 > 0])
    assert "__index_level_0__" in data.column_names
    trained(kind, tmp_path, data)


@pytest.mark.slow
def test_rows_are_shuffled_filtered_and_joined(kind: str, tmp_path: Path) -> None:
    data = KINDS[kind][2](12)
    data = concatenate_datasets([data.shuffle(seed=0).select(range(6)), data.filter(lambda row: "w1" in row["prompt"])])
    trained(kind, tmp_path, data)


@pytest.mark.slow
def test_rows_are_in_torch_format(kind: str, usual: Any, tmp_path: Path) -> None:
    data = KINDS[kind][2](8)
    assert losses(trained(kind, tmp_path, data.with_format("torch"))) == usual(kind)


@pytest.mark.slow
def test_rows_are_made_by_a_transform(usual: Any, tmp_path: Path) -> None:
    """As `set_transform` makes them from other columns, when they are read."""
    rows = unpaired(8)
    stored = rows.rename_columns({"completion": "answer"})
    stored.set_transform(
        lambda batch: {**{k: v for k, v in batch.items() if k != "answer"}, "completion": batch["answer"]}
    )
    assert losses(trained("bco", tmp_path, stored)) == usual("bco")


def test_an_answer_is_empty_and_another_equals_its_rival(kind: str, tmp_path: Path) -> None:
    rows = KINDS[kind][2](8).to_list()
    if kind == "cpo":
        rows[0]["chosen"], rows[1]["rejected"] = "", rows[1]["chosen"]
    else:
        rows[0]["completion"] = ""
    trained(kind, tmp_path, Dataset.from_list(rows))


@pytest.mark.slow
def test_some_prompts_are_longer_than_max_length(kind: str, tmp_path: Path) -> None:
    rows = KINDS[kind][2](8).to_list()
    rows[0]["prompt"] = rows[3]["prompt"] = "w1 " * 50
    trained(kind, tmp_path, Dataset.from_list(rows), max_length=16)


def test_a_batch_is_one_row(kind: str, tmp_path: Path) -> None:
    trained(kind, tmp_path, per_device_train_batch_size=1, max_steps=4)


def test_the_last_batch_is_smaller(kind: str, tmp_path: Path) -> None:
    trainer = trained(kind, tmp_path, KINDS[kind][2](7), max_steps=-1, num_train_epochs=2)
    assert len(losses(trainer)) == 4


def test_an_adapter_learns_under_checkpointing_and_bf16(kind: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = trained(kind, tmp_path, options={"peft_config": lora}, learning_rate=1e-2)
    assert trainer.args.gradient_checkpointing
    moved = [value.abs().max() for name, value in trainer.model.named_parameters() if "lora_B.default" in name]
    assert moved
    assert all(value > 0 for value in moved)


def test_a_model_is_loaded_in_bf16(kind: str, tmp_path: Path) -> None:
    trained(kind, tmp_path, options={"model": llama().bfloat16()})


def test_the_model_is_a_folder(kind: str, tmp_path: Path) -> None:
    """And so is the tokenizer, which nobody gives; BCO loads its reference from there as well."""
    folder = tmp_path / "model"
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    options: dict[str, Any] = {"model": str(folder), "processing_class": None}
    trainer = trained(kind, tmp_path, options=options)
    if kind == "bco":
        assert trainer.ref_model is not None
        assert losses(trainer)[0] == pytest.approx(0.6931472, rel=2e-3)


def test_the_saved_model_is_a_plain_one(kind: str, tmp_path: Path) -> None:
    trainer = trained(kind, tmp_path, learning_rate=1e-2)
    trainer.save_model(str(tmp_path / "saved"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    ids = torch.tensor([[1, 9, 17]])
    made = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape[1] > 3


@pytest.mark.slow
def test_a_run_is_interrupted_and_resumed(kind: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trained(kind, tmp_path / "a", **options)
    rest = made(kind, tmp_path / "b", **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-2"))
    assert losses(rest) == losses(whole)


def test_the_model_is_evaluated_before_and_after(kind: str, tmp_path: Path) -> None:
    trainer = made(kind, tmp_path, options={"eval_dataset": KINDS[kind][2](6)}, learning_rate=1e-2)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != before


@pytest.mark.slow
def test_rows_are_tokenised_by_several_processes(kind: str, usual: Any, tmp_path: Path) -> None:
    assert losses(trained(kind, tmp_path, dataset_num_proc=2)) == usual(kind)


def test_everybody_likes_everything(tmp_path: Path) -> None:
    """A log of thumbs has one class at first."""
    rows = unpaired(8).map(lambda row: {"label": 1})
    trainer = trained("bco", tmp_path, rows)
    assert losses(trainer, "rewards/rejected") == []


def test_the_reference_is_the_model_itself_or_a_name(tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(ValueError, match="`model` and `ref_model` cannot be the same object"):
        made("bco", tmp_path, options={"model": model, "ref_model": model})
    with pytest.raises(TypeError, match="ref_model is of no use: model must be a transformers model; got str"):
        made("bco", tmp_path, options={"ref_model": "gpt2"})
