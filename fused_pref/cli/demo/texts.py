"""From records to what the trainers and the evaluation take: the Tekken tokenizer, rows of text, one padded batch."""

from importlib import resources
from typing import Any

from torch import Tensor
from transformers import MistralCommonBackend  # type: ignore[attr-defined]

from fused_pref.cli.demo.records import Record

# A longer text is cut, so that one record of a user's file cannot exhaust the memory.
MAX_PROMPT, MAX_COMPLETION = 128, 128

Row = dict[str, str]


def load_tokenizer() -> MistralCommonBackend:
    """The Tekken tokenizer that the mistral-common package carries."""
    with resources.as_file(resources.files("mistral_common") / "data" / "tekken_240911.json") as path:
        return MistralCommonBackend(tokenizer_path=str(path))


def make_rows(records: list[Record], tokenizer: Any) -> tuple[list[Row], int]:
    """Rows of prompt, chosen and rejected for the trainers, and how many records were too long and had to be cut."""

    def cut(text: str, part: slice) -> str:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        return text if tokens[part] == tokens else tokenizer.decode(tokens[part])

    rows, number = [], 0
    for record in records:
        chosen, rejected = (_continuation(record.prompt, text) for text in (record.chosen, record.rejected))
        whole = {"prompt": record.prompt, "chosen": chosen, "rejected": rejected}
        row = {
            name: cut(text, slice(-MAX_PROMPT, None) if name == "prompt" else slice(MAX_COMPLETION))
            for name, text in whole.items()
        }
        rows.append(row)
        number += row != whole
    return rows, number


def make_batch(rows: list[Row], tokenizer: Any) -> dict[str, Tensor]:
    """All pairs as one batch, chosen sequences first, then rejected.

    Returns:
        ``input_ids`` and ``attention_mask`` (2B, T), padded on the right, and ``labels`` (2B, T), which are -100
        outside of the completions.
    """
    prompts = [row["prompt"] for row in rows] * 2
    completions = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for label, prompt in zip(labels, tokenizer(prompts)["input_ids"], strict=True):
        label[: len(prompt)] = -100
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def _continuation(prompt: str, completion: str) -> str:
    """The completion, set off from the prompt by a space if neither brings one."""
    return completion if prompt[-1].isspace() or completion[0].isspace() else f" {completion}"
