"""Folders of models, files of rows, and the command that makes files of log-probs of them."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl_models import llama, pairs, tokenizer, unpaired

from fused_pref.__main__ import main

# The rows that each trainer takes; the third prompt fills 8 tokens.
LONG = "w1 w2 w3 w4 w5 w6 w7 w8 w9 "


def rows(trainer: str, number: int = 18) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (pairs(number) if trainer == "dpo" else unpaired(number)).to_list()
    found[2]["prompt"] = LONG
    return found


def talks(number: int = 18) -> list[dict[str, Any]]:
    """Pairs of conversations, with a text beside them that is the prompt once more."""
    return [
        {
            "prompt": row["prompt"],
            **{
                side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
                for side in ("chosen", "rejected")
            },
        }
        for row in pairs(number).to_list()
    ]


def save_model(folder: Path, model: Any = None, words: Any = None) -> str:
    """A folder with a model and a tokenizer."""
    (llama() if model is None else model).save_pretrained(folder)
    (tokenizer() if words is None else words).save_pretrained(folder)
    return str(folder)


def save_rows(path: Path, content: list[dict[str, Any]]) -> str:
    Dataset.from_list(content).to_json(path)
    return str(path)


def command(folder: Path, model: str, content: list[dict[str, Any]], *options: str, status: int = 0) -> Path:
    """The file that the command makes, in float32 and short sequences, unless the options say otherwise."""
    out = folder / "reference.jsonl"
    data = save_rows(folder / "rows.jsonl", content)
    given = ["--max-length", "9", "--precision", "fp32", "--batch-size", "4", *options]
    assert main(["ref-logps", data, "--model", model, "--out", str(out), *given]) == status
    return out
