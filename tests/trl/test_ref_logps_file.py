"""Trainers with the log-probs of their reference from a file: the same training, and what does not match is refused."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from reference_files import command, rows, save_model, talks
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl_models import TEMPLATE, TRAINING, llama, tokenizer
from trl_runs import flat

from fused_pref.trl import BCOConfig, BCOTrainer, DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
KINDS: dict[str, tuple[Any, Any]] = {
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "bco": (BCOTrainer, BCOConfig),
}
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
OWN = {"dpo": [], "kto": ["--kl-batch-size", "4"], "bco": ["--trainer", "bco"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def file(model: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a trainer, made once."""

    @functools.cache
    def made(trainer: str) -> Path:
        return command(tmp_path_factory.mktemp(trainer), model, rows(trainer), *OWN[trainer])

    return made


def make(trainer: str, folder: Path, model: Any, path: Path | None, **changes: Any) -> Any:
    """A trainer on the rows of the command, whose options and arguments may be others."""
    kind, config = KINDS[trainer]
    taken = {"train_dataset", "eval_dataset", "processing_class", "ref_model", "peft_config", "data_collator"}
    given = {name: changes.pop(name) for name in taken & set(changes)}
    options = {**TRAINING, "max_length": 9, "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 0.05}
    reference = {"precompute_ref_log_probs": True} if path is None else {"ref_logps_file": str(path)}
    set_seed(0)
    return kind(
        AutoModelForCausalLM.from_pretrained(model) if isinstance(model, str) else model,
        args=config(str(folder / "out"), **{**options, "optim": "sgd", "beta": 0.5, **reference, **changes}),
        **{
            "train_dataset": Dataset.from_list(rows(trainer)),
            "processing_class": AutoTokenizer.from_pretrained(model) if isinstance(model, str) else tokenizer(),
            **given,
        },
    )


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("trainer", KINDS)
def test_training_is_that_with_precomputed_log_probs(
    trainer: str, model: str, file: Callable[[str], Path], tmp_path: Path
) -> None:
    """Shuffled, over more than an epoch, with evaluations; no reference is made."""
    options = {"eval_dataset": Dataset.from_list(rows(trainer, 6)), "eval_strategy": "steps", "eval_steps": 3}
    taken, computed = (make(trainer, tmp_path, model, path, **options) for path in (file(trainer), None))
    assert taken.ref_model is None
    columns = [name for name in taken.train_dataset.column_names if name.startswith("ref_")]
    assert len(columns) == (1 if trainer == "bco" else 2)
    assert taken.train_dataset.column_names == computed.train_dataset.column_names
    assert taken.train_dataset.features == computed.train_dataset.features
    for column in columns:
        assert taken.train_dataset[column] == pytest.approx(computed.train_dataset[column], rel=1e-6)
    for each in (taken, computed):
        each.train()
    assert len(losses(taken)) == 6
    assert losses(taken) == pytest.approx(losses(computed), rel=1e-5)
    evaluated = [
        [entry["eval_loss"] for entry in each.state.log_history if "eval_loss" in entry] for each in (taken, computed)
    ]
    assert len(evaluated[0]) == 2
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)
    torch.testing.assert_close(flat(taken.model), flat(computed.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trainer", KINDS)
def test_the_reference_is_not_run_and_the_numbers_matter(
    trainer: str, model: str, file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*given: Any) -> None:
        raise AssertionError("the reference is run")

    path = file(trainer)
    monkeypatch.setattr(KINDS[trainer][0], "compute_ref_log_probs", never)
    taken = make(trainer, tmp_path, model, path, max_steps=1, train_sampling_strategy="sequential")
    taken.train()
    header, *lines = path.read_text().splitlines(keepends=True)
    moved = [json.loads(line) for line in lines]
    name = json.loads(header)["columns"][0]
    changed = tmp_path / "changed.jsonl"
    for line in moved:
        line[name] -= 3 * (line["row"] % 3 != 1)  # of single sequences, the desirable ones
    changed.write_text(header + "".join(json.dumps(line) + "\n" for line in moved))
    other = make(trainer, tmp_path, model, changed, max_steps=1, train_sampling_strategy="sequential")
    other.train()
    assert abs(losses(taken)[0] - losses(other)[0]) > 0.05


def test_kto_without_a_kl_term_takes_the_files_of_both(model: str, file: Callable[[str], Path], tmp_path: Path) -> None:
    for trainer in ("kto", "bco"):
        taken = make("kto", tmp_path, model, file(trainer), loss_type="apo_zero_unpaired")
        assert "ref_KL_logps" not in taken.train_dataset.column_names
        assert "ref_KL_logps" not in make("bco", tmp_path, model, file(trainer)).train_dataset.column_names


@pytest.mark.slow
def test_kl_completions_of_a_whole_step(model: str, file: Callable[[str], Path], tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    taken, computed = (
        make("kto", tmp_path, model, path, **options, exact_accumulation=True, max_steps=3)
        for path in (file("kto"), None)
    )
    for each in (taken, computed):
        each.train()
    assert losses(taken) == pytest.approx(losses(computed), rel=1e-5)
    with pytest.raises(ValueError, match="with kl_batch_size=2, as asked for; got 4"):
        make("kto", tmp_path, model, file("kto"), **options)


def test_rows_of_pairs_for_kto(model: str, tmp_path: Path) -> None:
    path = command(tmp_path, model, rows("dpo"), "--trainer", "kto", "--kl-batch-size", "4")
    data = rows("dpo")
    taken = make("kto", tmp_path, model, path, train_dataset=Dataset.from_list(data))
    assert len(taken.train_dataset) == 34
    data[11]["chosen"] = "w1"
    with pytest.raises(ValueError, match=r"got another one for train_dataset\[11\]$"):
        make("kto", tmp_path, model, path, train_dataset=Dataset.from_list(data))


def test_conversations(model: str, tmp_path: Path) -> None:
    path = command(tmp_path, model, talks(), "--max-length", "40")
    options = {"train_dataset": Dataset.from_list(talks()), "max_length": 40}
    taken, computed = (make("dpo", tmp_path, model, each, **options) for each in (path, None))
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert taken.train_dataset[name] == pytest.approx(computed.train_dataset[name], rel=1e-6)
    words = AutoTokenizer.from_pretrained(model)
    words.chat_template = TEMPLATE + " "
    with pytest.raises(ValueError, match=r"must be made with chat_template='.*', as asked for; got '"):
        make("dpo", tmp_path, model, path, **options, processing_class=words)


def test_a_template_does_not_matter_to_texts(model: str, file: Callable[[str], Path], tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(model)
    words.chat_template = None
    make("dpo", tmp_path, model, file("dpo"), processing_class=words)


# What is refused, before anything is written.


def assert_refused(match: str, trainer: str, folder: Path, model: Any, path: Path, **changes: Any) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        make(trainer, folder, model, path, **changes)
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists()


def words_more() -> Any:
    words = tokenizer()
    words.add_tokens(["w99"])
    return words


MISMATCHES: dict[str, tuple[str, str, Callable[[], dict[str, Any]]]] = {
    "length": ("dpo", "must be made with max_length=12, as asked for; got 9", lambda: {"max_length": 12}),
    "no length": ("kto", "must be made with max_length=None, as asked for; got 9", lambda: {"max_length": None}),
    "truncation": (
        "dpo",
        "must be made with truncation_mode='keep_end', as asked for; got 'keep_start'",
        lambda: {"truncation_mode": "keep_end"},
    ),
    "weights of tokens": ("dpo", "must be made with ld_alpha=0.5, as asked for; got None", lambda: {"ld_alpha": 0.5}),
    "tokenizer": ("bco", "must be made with vocabulary='.*'; got '", lambda: {"processing_class": words_more()}),
    "EOS token": (
        "bco",
        "must be made with vocabulary='.*'; got '",
        lambda: {"processing_class": tokenizer(eos_token="<s>")},
    ),
    "KL completions": (
        "kto",
        "must be made with kl_batch_size=6, as asked for; got 4",
        lambda: {"per_device_train_batch_size": 6},
    ),
    "fewer rows": (
        "dpo",
        "must have the 9 rows of train_dataset that have been tokenised; got 17",
        lambda: {"train_dataset": Dataset.from_list(rows("dpo", 10))},
    ),
    "more rows": (
        "bco",
        "must have the 19 rows of train_dataset that have been tokenised; got 17",
        lambda: {"train_dataset": Dataset.from_list([*rows("bco"), *rows("bco")[:2]])},
    ),
    "shuffled rows": (
        "dpo",
        r"must be made of the rows of train_dataset; got another one for train_dataset\[0\]",
        lambda: {"train_dataset": Dataset.from_list(rows("dpo")[::-1])},
    ),
    "a stream": (
        "kto",
        "ref_logps_file needs a train_dataset that is a datasets.Dataset without pictures",
        lambda: {"train_dataset": Dataset.from_list(rows("kto")).to_iterable_dataset()},
    ),
    "log-probs that are there": (
        "dpo",
        "train_dataset must not have columns of log-probs beside ref_logps_file; got ref_chosen_logps",
        lambda: {"train_dataset": Dataset.from_list([{**row, "ref_chosen_logps": 0.0} for row in rows("dpo")])},
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_what_does_not_match(name: str, model: str, file: Callable[[str], Path], tmp_path: Path) -> None:
    trainer, match, changes = MISMATCHES[name]
    assert_refused(
        match.replace("'; got", "', as asked for; got"), trainer, tmp_path, model, file(trainer), **changes()
    )


@pytest.mark.parametrize(("trainer", "number"), [("dpo", 0), ("dpo", 3), ("kto", 3), ("bco", 17)])
def test_a_changed_row(trainer: str, number: int, model: str, file: Callable[[str], Path], tmp_path: Path) -> None:
    """By its number, whatever was left out before it; whatever of it is changed."""
    for column in {"prompt", "rejected" if trainer == "dpo" else "completion"}:
        data = rows(trainer)
        data[number][column] = "w7 " + data[number][column]
        match = rf"got another one for train_dataset\[{number}\]$"
        assert_refused(match, trainer, tmp_path, model, file(trainer), train_dataset=Dataset.from_list(data))


def test_a_changed_label_is_taken(model: str, file: Callable[[str], Path], tmp_path: Path) -> None:
    data = rows("kto")
    data[5]["label"] = not data[5]["label"]
    make("kto", tmp_path, model, file("kto"), train_dataset=Dataset.from_list(data))


def test_kl_completions_of_other_batches(model: str, file: Callable[[str], Path], tmp_path: Path) -> None:
    """Several processes tokenise: their parts end inside of a batch."""
    match = r"got another one for the KL completion of train_dataset\[\d+\]$"
    assert_refused(match, "kto", tmp_path, model, file("kto"), dataset_num_proc=2)


def test_files_of_other_trainers(model: str, file: Callable[[str], Path], tmp_path: Path) -> None:
    match = "must have ref_chosen_logps, ref_rejected_logps; got ref_logps, ref_KL_logps, made with --trainer kto"
    assert_refused(match, "dpo", tmp_path, model, file("kto"))
    match = "must have ref_KL_logps; got ref_logps, made with --trainer bco"
    assert_refused(match, "kto", tmp_path, model, file("bco"))


def test_files_that_are_not_complete(model: str, file: Callable[[str], Path], tmp_path: Path) -> None:
    content = file("dpo").read_bytes()
    path = tmp_path / "part.jsonl"
    for end, rows_there in ((content.index(b"\n") + 1, 0), (len(content) - 1, 16)):
        path.write_bytes(content[:end])
        match = rf"ref_logps_file must have 17 rows; got {rows_there}: run the command"
        assert_refused(match, "dpo", tmp_path, model, path)
    for other in (b"", b"notes", content[:20]):
        path.write_bytes(other)
        assert_refused("ref_logps_file must be a file that `fused-pref ref-logps` made", "dpo", tmp_path, model, path)
    match = "ref_logps_file must be a file that can be read; got '.*': No such file"
    assert_refused(match, "dpo", tmp_path, model, tmp_path / "nowhere")


# The model that the file is of.


def test_another_model(model: str, file: Callable[[str], Path], tmp_path: Path) -> None:
    path = file("dpo")
    match = "whose weights have the hash '.*'; got the file of '.*' with '.*', which ref_logps_any_model=True takes"
    assert_refused(match, "dpo", tmp_path, llama(seed=1), path)
    assert_refused(match, "dpo", tmp_path, llama(), path, ref_model=llama(seed=1))
    evaluated = {"eval_dataset": Dataset.from_list(rows("dpo", 6))}
    match = "an eval_dataset needs a ref_model beside ref_logps_any_model=True"
    assert_refused(match, "dpo", tmp_path, llama(seed=1), path, ref_logps_any_model=True, **evaluated)
    # The policy may have moved on.
    trainer = make("dpo", tmp_path, llama(seed=1), path, ref_logps_any_model=True)
    assert trainer.ref_model is None
    with pytest.raises(ValueError, match=match):
        trainer.evaluate(evaluated["eval_dataset"])
    make("dpo", tmp_path, llama(seed=1), path, ref_model=llama(), **evaluated, max_steps=1).train()
    make("dpo", tmp_path, llama().to(torch.bfloat16), path)


def adapted() -> Any:
    adapted = get_peft_model(llama(), LORA)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapted


@pytest.mark.slow
@pytest.mark.parametrize("trainer", KINDS)
def test_adapters(trainer: str, model: str, file: Callable[[str], Path], tmp_path: Path) -> None:
    """The reference is the model without the adapter that is trained, but with one that it came with."""
    path = file(trainer)
    assert_refused("which is the model with the adapter that it came with", trainer, tmp_path, adapted(), path)
    taken = make(trainer, tmp_path, llama(), path, peft_config=LORA, max_steps=2)
    computed = make(trainer, tmp_path, llama(), None, peft_config=LORA, max_steps=2)
    for each in (taken, computed):
        each.train()
    assert losses(taken) == pytest.approx(losses(computed), rel=1e-5)
    make(trainer, tmp_path, get_peft_model(llama(), LORA), path)
    make(trainer, tmp_path, adapted(), path, ref_logps_any_model=True)
    other = get_peft_model(llama(seed=1), LORA)
    with pytest.raises(ValueError, match="whose weights have the hash"):
        make(trainer, tmp_path, other, path)
