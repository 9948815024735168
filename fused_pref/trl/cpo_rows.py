"""Tokenised pairs and their batches, as TRL's CPO makes them of texts for causal language models."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

SIDES = ("chosen", "rejected")
COLUMNS = ("input_ids", "attention_mask", "labels")


def tokenized_pair(row: Mapping[str, str], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """Token ids, attention mask and labels of both sequences of a row of texts, and of the prompt.

    A prompt is tokenised with its completion; where its last token is another one there, it belongs to the completion.
    BOS and EOS are added where they are missing, and a completion is cut to what ``max_length`` leaves of it.

    Args:
        row: ``prompt``, ``chosen`` and ``rejected``.
        tokenizer: with an EOS token.
        max_length: tokens of a sequence.

    Raises:
        ValueError: tokens of the prompt before its last one differ between the sequences.
    """
    prompt, bos, eos = row["prompt"], tokenizer.bos_token_id, tokenizer.eos_token_id
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    prompts, pair = [], {}
    for side in SIDES:
        ids = tokenizer(prompt + row[side], add_special_tokens=False)["input_ids"]
        if len(ids) < len(alone):
            raise ValueError(f"a prompt must have no more tokens than with its {side} text; got {prompt[:40]!r}")
        length = len(alone) if ids[: len(alone)] == alone else len(alone) - 1
        prompts.append(ids[:length])
        start, completion = _started(ids[:length], bos), ids[length:]
        if not completion or completion[-1] != eos:
            completion = [*completion, eos]
        completion = completion[: max(0, max_length - len(start))]
        pair[f"{side}_input_ids"] = start + completion
        pair[f"{side}_attention_mask"] = [1] * len(start + completion)
        pair[f"{side}_labels"] = [-100] * len(start) + completion
    chosen, rejected = prompts
    if sum(a != b for a, b in zip(chosen, rejected, strict=False)) > 1 or abs(len(chosen) - len(rejected)) > 1:
        raise ValueError(f"a prompt must have the same tokens in both sequences, but for one; got {prompt[:40]!r}")
    ids = _started(alone[: min(map(len, prompts))], bos)
    return {**pair, "prompt_input_ids": ids, "prompt_attention_mask": [1] * len(ids)}


class PairCollator:
    """Batches of tokenised pairs, padded on the right to one length.

    Attributes:
        pad_token_id: of the tokenizer.
    """

    def __init__(self, pad_token_id: int | None) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """(B, T) int64 ids, mask and labels of the chosen and of the rejected sequences."""
        batch = {}
        for side in SIDES:
            for column, padding in zip(COLUMNS, paddings(self.pad_token_id), strict=True):
                tensors = [torch.tensor(row[f"{side}_{column}"], dtype=torch.int64) for row in rows]
                batch[f"{side}_{column}"] = pad_sequence(tensors, batch_first=True, padding_value=padding)
        return batch


def stacked_sides(batch: Mapping[str, Tensor], pad_token_id: int | None, device: Any) -> dict[str, Tensor]:
    """``concatenated_input_ids`` and the like, (2B, T), chosen sequences first."""
    width = max(batch[f"{side}_input_ids"].shape[1] for side in SIDES)
    stacked = {}
    for column, padding in zip(COLUMNS, paddings(pad_token_id), strict=True):
        sides = (batch[f"{side}_{column}"].to(device) for side in SIDES)
        padded = [F.pad(tensor, (0, width - tensor.shape[1]), value=padding) for tensor in sides]
        stacked[f"concatenated_{column}"] = torch.cat(padded)
    return stacked


def paddings(pad_token_id: int | None) -> tuple[int, int, int]:
    """Of each of ``COLUMNS``."""
    return (pad_token_id or 0), 0, -100


def _started(ids: list[int], bos: int | None) -> list[int]:
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
