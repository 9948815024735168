"""Every trainer learns from a file of text that this project did not write: names as the iso-codes project says them.

The catalogues of their translations come with pycountry.
"""

import gettext
import json
from pathlib import Path
from typing import Any

import pycountry
import pytest
from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, set_seed
from trl_models import SPECIAL, TRAINING, llama

from fused_pref import trl

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")
CATALOGUES = Path(pycountry.__file__).with_name("locales")
LANGUAGES = {"ru": "Russian", "el": "Greek", "ja": "Japanese", "de": "German"}
ROWS = 80


def translations() -> list[dict[str, str]]:
    """Countries in four languages, preferred to the English name left as it is."""
    rows = []
    for country in sorted(country.name for country in pycountry.countries):
        for code, language in LANGUAGES.items():
            translated = gettext.translation("iso3166-1", CATALOGUES, [code]).gettext(country)
            if translated != country:
                prompt = f"Translate from English to {language}: {country}\n{language}: "
                rows.append({"prompt": prompt, "chosen": translated, "rejected": country})
    return rows[:ROWS]


def singles(pairs: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Both completions of a pair, one after the other."""
    sides = {"chosen": True, "rejected": False}
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": label}
        for pair in pairs
        for side, label in sides.items()
    ]


def reader() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    alphabet = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={text: number for number, text in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CPO", "DPO", "KTO", "BCO"])
def test_a_file_of_json_lines(tmp_path: Path, name: str) -> None:
    path = tmp_path / "translations.jsonl"
    rows = translations() if name in ("CPO", "DPO") else singles(translations())
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    data: Any = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(data) == len(rows) >= ROWS
    words, sizes = reader(), {"max_position_embeddings": 128}
    assert words.decode(words(rows[2]["prompt"])["input_ids"]) == rows[2]["prompt"]
    set_seed(0)
    steps = {"max_steps": 10, "learning_rate": 3e-3, "per_device_train_batch_size": 8, "beta": 0.1, "max_length": 128}
    reference = {} if name == "CPO" else {"ref_model": llama(vocab_size=len(words), **sizes)}
    trainer = getattr(trl, f"{name}Trainer")(
        model=llama(vocab_size=len(words), **sizes),
        **reference,
        args=getattr(trl, f"{name}Config")(str(tmp_path / "out"), **{**TRAINING, **steps}),
        train_dataset=data,
        processing_class=words,
    )
    trainer.train()
    losses, margins = (
        [entry[key] for entry in trainer.state.log_history if key in entry] for key in ("loss", "rewards/margins")
    )
    assert len(losses) == len(margins) == 10
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    assert sum(margins[-3:]) > sum(margins[:3]) + 0.5
