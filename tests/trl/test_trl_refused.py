"""What the trainers refuse: one clear sentence each, before training, and nothing written."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from torch import nn
from transformers import TrainingArguments
from trl_models import TRAINING, llama, llava_processor, pairs, t5, tokenizer, unpaired

import fused_pref.trl
from fused_pref.trl import BCOConfig, BCOTrainer, CPOTrainer, DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, rows
from fused_pref.trl.stock import StockCPOConfig

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
OPTIONS = {**TRAINING, "max_steps": 1}


class Kind:
    """A trainer with its configuration and its data."""

    def __init__(self, trainer: type, config: type, data: Dataset) -> None:
        self.trainer, self.config, self.rows = trainer, config, data
        self.column = "completion" if "completion" in data.column_names else "chosen"


KINDS = {
    "cpo": Kind(CPOTrainer, StockCPOConfig, pairs(4)),
    "bco": Kind(BCOTrainer, BCOConfig, unpaired(4)),
    "kto": Kind(KTOTrainer, KTOConfig, unpaired(4)),
    "dpo": Kind(DPOTrainer, DPOConfig, pairs(4)),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def make(kind: Kind, folder: Path, options: dict[str, Any] | None = None, **changes: Any) -> Any:
    return kind.trainer(
        **{
            "model": llama(),
            "args": kind.config(str(folder / "out"), **{**OPTIONS, **(options or {})}),
            "train_dataset": kind.rows,
            "processing_class": tokenizer(),
            # Without one, TRL's DPO loads it by the name of the model.
            **({"ref_model": llama(seed=3)} if kind.trainer is DPOTrainer else {}),
            **changes,
        }
    )


def assert_refused(match: str, kind: Kind, folder: Path, error: type = ValueError, **given: Any) -> None:
    with pytest.raises(error, match=match):
        make(kind, folder, **given)
    assert list(folder.iterdir()) == []


def changed(kind: Kind, column: str, value: Any) -> Dataset:
    """The rows with one entry changed, in the third."""
    entries = [{**row, column: value if number == 2 else row[column]} for number, row in enumerate(kind.rows)]
    return Dataset.from_list(entries)


def test_no_rows(kind: Kind, tmp_path: Path) -> None:
    assert_refused(
        "train_dataset must have at least one row; got none", kind, tmp_path, train_dataset=kind.rows.select([])
    )
    empty = Dataset.from_list([])
    assert_refused("train_dataset must have at least one row; got none", kind, tmp_path, train_dataset=empty)
    assert_refused("eval_dataset must have at least one row", kind, tmp_path, eval_dataset=kind.rows.select([]))
    assert_refused("train_dataset", kind, tmp_path, train_dataset=None)


def test_rows_of_another_form(kind: Kind, tmp_path: Path) -> None:
    data = Dataset.from_list([{"text": "w1"}])
    assert_refused(
        r"train_dataset must have the columns .*chosen, rejected; got text", kind, tmp_path, train_dataset=data
    )
    listed = [{"prompt": "w1"}]
    assert_refused("train_dataset must be a datasets", kind, tmp_path, TypeError, train_dataset=listed)


def test_malformed_texts(kind: Kind, tmp_path: Path) -> None:
    columns = [column for column in kind.rows.column_names if column != "label"]
    assert len(columns) > 1
    for column in columns:
        place = rf"train_dataset\[2\]\['{column}'\] must be a text or a list of messages; got 'None'"
        assert_refused(place, kind, tmp_path, train_dataset=changed(kind, column, None))


def test_malformed_labels(tmp_path: Path) -> None:
    data = changed(KINDS["bco"], "label", None)
    match = r"train_dataset\[2\]\['label'\] must be true or false, or 1 or 0; got None"
    assert_refused(match, KINDS["bco"], tmp_path, train_dataset=data)


@pytest.mark.slow
def test_malformed_rows_of_a_large_dataset_are_found_without_reading_it(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 20,000; also behind a selection that has others left out."""
    column = kind.column
    texts = {name: kind.rows[name][:1] * 20_000 for name in kind.rows.column_names}
    for bad, value in ((column, None), ("label", 3)):
        if bad not in texts:
            continue
        good = [int(entry) for entry in texts[bad]] if bad == "label" else texts[bad]
        entries = [*good[:-5], value, *good[-4:]]
        data = Dataset.from_dict({**texts, bad: entries})
        read = []
        monkeypatch.setattr(rows, "_check_row", _counted(rows._check_row, read))
        assert_refused(rf"train_dataset\[19995\]\['{bad}'\] must be", kind, tmp_path, train_dataset=data)
        data = data.select(range(len(data) - 1, -1, -1))
        assert_refused(rf"train_dataset\[4\]\['{bad}'\] must be", kind, tmp_path, train_dataset=data)
        rows.check_rows("data", data.select(range(5, 10_000)), [tuple(kind.rows.column_names)])
        assert 0 < len(read) < 150
        monkeypatch.undo()


def _counted(function: Any, calls: list[Any]) -> Any:
    return lambda *given: calls.append(given) or function(*given)


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 1000, 1023])
def test_the_sample_is_spread_over_the_rows(size: int) -> None:
    seen = [row["at"] for row in rows.spread(Dataset.from_dict({"at": list(range(size))}))]
    assert seen == sorted(set(seen))
    assert len(seen) <= 2 * rows.SAMPLE
    if size:
        assert seen[0] == 0
        assert size - seen[-1] <= max(1, size // rows.SAMPLE)


def test_the_first_scored_row_is_found_by_a_sample(tmp_path: Path) -> None:
    """The first half of the prompts fills the length."""
    long = " ".join(["w1"] * 40)
    data = Dataset.from_list([{"prompt": long, "chosen": "w2", "rejected": "w3"}] * 200 + pairs(200).to_list())
    seen = []

    class Counted(CPOTrainer):
        def scored(self, row: dict[str, Any]) -> bool:
            seen.append(row)
            return super().scored(row)

    make(Kind(Counted, StockCPOConfig, data), tmp_path)
    assert len(seen) < 40


def test_texts_and_messages_together(kind: Kind, tmp_path: Path) -> None:
    talk = [{"role": "assistant", "content": "w2"}]
    match = r"train_dataset\[0\] must have texts throughout or messages throughout; got both"
    if kind.column == "chosen":
        row = {"prompt": "w1", "chosen": talk, "rejected": "w2"}
    else:
        row = {"prompt": "w1", "completion": talk, "label": True}
        assert_refused(match, kind, tmp_path, train_dataset=Dataset.from_list([row]))
        row = {"prompt": talk, "chosen": "w1", "rejected": "w2"}
    assert_refused(match, kind, tmp_path, train_dataset=Dataset.from_list([row]))
    row = {"prompt": "w1", "chosen": [{"content": "w2"}], "rejected": "w2"}
    match = r"\['chosen'\] must be a text or a list of messages; got .*, whose first entry has no role"
    assert_refused(match, kind, tmp_path, train_dataset=Dataset.from_list([row]))
    row = {"prompt": "w1", "chosen": [], "rejected": talk}
    assert_refused(r"\['chosen'\] must be a text or", kind, tmp_path, train_dataset=Dataset.from_list([row]))


def test_conversations_without_a_prompt_in_common(kind: Kind, tmp_path: Path) -> None:
    row = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    match = r"train_dataset\[0\] must have chosen and rejected that begin with the same message, which is the prompt"
    for prompt in ({}, {"prompt": "w1"}):
        assert_refused(match, kind, tmp_path, train_dataset=Dataset.from_list([{**prompt, **row}]))


def test_columns_that_the_chat_template_refuses(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "w1"}]
    row = {side: [*asked, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    data = Dataset.from_list([{**row, "messages": row["chosen"]}])
    match = r"train_dataset must not have the column messages .* call train_dataset.remove_columns\(\['messages'\]\)"
    assert_refused(match, KINDS["cpo"], tmp_path, train_dataset=data)
    make(KINDS["cpo"], tmp_path, train_dataset=data.remove_columns(["messages"]))


def test_completions_that_are_all_cut_off(kind: Kind, tmp_path: Path) -> None:
    match = "no row of train_dataset has a completion token left to score: max_length=2"
    assert_refused(match, kind, tmp_path, options={"max_length": 2})


def test_no_output_embeddings(kind: Kind, tmp_path: Path) -> None:
    assert_refused("LlamaModel has none", kind, tmp_path, model=llama().model)


@pytest.mark.parametrize("name", ["bco", "kto", "dpo"])
def test_an_encoder_decoder(tmp_path: Path, name: str) -> None:
    assert_refused("T5ForConditionalGeneration is an encoder-decoder", KINDS[name], tmp_path, model=t5())


def test_datasets_of_another_kind(kind: Kind, tmp_path: Path) -> None:
    parts = DatasetDict({"train": kind.rows})
    assert_refused("train_dataset must be a datasets.Dataset", kind, tmp_path, TypeError, train_dataset=parts)
    if kind.trainer is CPOTrainer:
        stream = kind.rows.to_iterable_dataset()
        match = "train_dataset must be a datasets.Dataset; got IterableDataset"
        assert_refused(match, kind, tmp_path, TypeError, train_dataset=stream)
        match = "eval_dataset must be a datasets.Dataset, or a DatasetDict of them; got dict"
        assert_refused(match, kind, tmp_path, TypeError, eval_dataset={"a": kind.rows})
        parts = DatasetDict({"a": kind.rows, "b": changed(kind, "chosen", None)})
        match = r"eval_dataset\['b'\]\[2\]\['chosen'\] must be a text"
        assert_refused(match, kind, tmp_path, eval_dataset=parts)
    else:
        stream = changed(kind, kind.column, None).select([2]).to_iterable_dataset()
        assert_refused(rf"train_dataset\[0\]\['{kind.column}'\] must be", kind, tmp_path, train_dataset=stream)
        parts = {"a": kind.rows, "b": kind.rows.select([])}
        assert_refused(r"eval_dataset\['b'\] must have at least one row", kind, tmp_path, eval_dataset=parts)


def test_no_pad_token(kind: Kind, tmp_path: Path) -> None:
    match = r"processing_class must have a pad token or an EOS token to pad with; got a \w+ without"
    assert_refused(match, kind, tmp_path, processing_class=tokenizer(pad_token=None, eos_token=None))


def test_no_eos_token(kind: Kind, tmp_path: Path) -> None:
    """TRL puts it after texts; a chat template has its own."""
    match = "processing_class must have an EOS token, which ends the completions; set its eos_token"
    assert_refused(match, kind, tmp_path, processing_class=tokenizer(eos_token=None))


def test_a_tokenizer_given_as_something_else(kind: Kind, tmp_path: Path) -> None:
    match = "processing_class must be a tokenizer, not its name; got 'gpt2': load it with transformers.AutoTokenizer"
    assert_refused(match, kind, tmp_path, TypeError, processing_class="gpt2")
    match = "processing_class must be a tokenizer of transformers; got a WhitespaceSplit"
    assert_refused(match, kind, tmp_path, TypeError, processing_class=tokenizer().backend_tokenizer.pre_tokenizer)


def test_a_processor_in_cpo(tmp_path: Path) -> None:
    match = "processing_class must be a tokenizer, since this trainer reads text alone; got a LlavaProcessor: give its"
    assert_refused(match, KINDS["cpo"], tmp_path, TypeError, processing_class=llava_processor())


def test_weights_of_prompts_need_all_rows_as_text(tmp_path: Path) -> None:
    kind, given = KINDS["bco"], {"embedding_func": lambda texts: [[1.0]] * len(texts)}
    match = "embedding_func needs a train_dataset that is a datasets.Dataset, .* stream .*; got IterableDataset"
    assert_refused(match, kind, tmp_path, train_dataset=kind.rows.to_iterable_dataset(), **given)
    pictures = kind.rows.add_column("image", [0] * len(kind.rows))
    match = "embedding_func weighs prompts of text alone; train_dataset must have no pictures; got image"
    assert_refused(match, kind, tmp_path, train_dataset=pictures, **given)


def test_data_parallel(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused("must not be an", kind, tmp_path, model=nn.DataParallel(llama()))
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    assert_refused(r"nn\.DataParallel over 2 GPUs is not supported", kind, tmp_path)


def test_liger(kind: Kind, tmp_path: Path) -> None:
    """TRL's KTO and DPO leave Liger's cross-entropy out of their own accord; its CPO does not."""
    if kind.trainer is CPOTrainer:
        assert_refused("use_liger_kernel=True replaces", kind, tmp_path, options={"use_liger_kernel": True})
    else:
        make(kind, tmp_path, options={"use_liger_kernel": True})


def test_an_adapter_on_the_head(kind: Kind, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    assert_refused("lm_head|adapter on the output head", kind, tmp_path, peft_config=config)


def test_the_wrong_arguments(kind: Kind, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True)
    assert_refused(
        f"args must be a {kind.config.__name__}; got TrainingArguments", kind, tmp_path, TypeError, args=args
    )
    assert_refused("unexpected keyword argument", kind, tmp_path, TypeError, beta=0.1)


@pytest.mark.parametrize(("installed", "found"), [("1.14.2", "TRL 1.14.2 is installed"), (None, r"pip install")])
def test_the_version_of_trl(monkeypatch: pytest.MonkeyPatch, installed: str | None, found: str) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise fused_pref.trl.importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr("importlib.metadata.version", version)
    with pytest.raises(ImportError, match=rf"fused_pref\.trl needs TRL 1\.15 or newer.*{found}"):
        fused_pref.trl._require_trl()
    with pytest.raises(AttributeError, match="no attribute 'ORPOTrainer'"):
        fused_pref.trl.ORPOTrainer  # noqa: B018


@pytest.mark.slow
def test_importing_the_library_imports_no_trainer() -> None:
    program = (
        "import sys, fused_pref, fused_pref.models; sys.exit('transformers' in sys.modules or 'trl' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
