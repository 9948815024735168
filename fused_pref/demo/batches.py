"""From records to batches: the Tekken tokenizer, padding and the order of training."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

import torch
import torch.nn.functional as F
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from torch import Tensor

from fused_pref.demo.records import Record

# A longer text is cut, so that one record of a user's file cannot exhaust the memory.
MAX_PROMPT, MAX_COMPLETION = 128, 128


@dataclass(frozen=True)
class Pair:
    """Token ids of a record: the end of its prompt and the beginnings of its completions."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Batch:
    """B pairs, chosen sequences first, then rejected.

    Attributes:
        input_ids: int64 (2B, T), padded on the right; under a causal mask no token sees the padding, so that the
            model needs no attention mask.
        scored: bool (2B, T), whether the token after this one belongs to a completion. Only these N positions are
            given to the head, as packed sequences: logits of prompts and padding would be most of its work.
    """

    input_ids: Tensor
    scored: Tensor

    @property
    def labels(self) -> Tensor:
        """(N,), the token after each scored position."""
        return self.input_ids.roll(-1, 1)[self.scored]

    @property
    def lengths(self) -> Tensor:
        """(2B,), scored tokens of each sequence."""
        return self.scored.sum(1)

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 (2B + 1,), where each packed sequence begins and the last one ends."""
        return F.pad(self.lengths.cumsum(0), (1, 0)).int()

    def first(self, pairs: int) -> "Batch":
        """The first pairs of the batch."""
        half = len(self.input_ids) // 2
        rows = [side + pair for side in (0, half) for pair in range(min(pairs, half))]
        return Batch(self.input_ids[rows], self.scored[rows])


def load_tokenizer() -> Tekkenizer:
    """The Tekken tokenizer that the mistral-common package carries."""
    with resources.as_file(resources.files("mistral_common") / "data" / "tekken_240911.json") as path:
        return Tekkenizer.from_file(str(path))


def tokenize(records: list[Record], tokenizer: Tekkenizer) -> tuple[list[Pair], int]:
    """Pairs of token ids, and how many records were too long and had to be cut."""
    pairs, cut = [], 0
    for record in records:
        prompt = tokenizer.encode(record.prompt, bos=True, eos=False)
        chosen, rejected = (
            tokenizer.encode(_continuation(record.prompt, text), bos=False, eos=True)
            for text in (record.chosen, record.rejected)
        )
        cut += len(prompt) > MAX_PROMPT or max(len(chosen), len(rejected)) > MAX_COMPLETION
        pairs.append(Pair(prompt[-MAX_PROMPT:], chosen[:MAX_COMPLETION], rejected[:MAX_COMPLETION]))
    return pairs, cut


def make_batch(pairs: list[Pair], device: torch.device) -> Batch:
    """Pad pairs to one length."""
    sequences = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    length = max(len(prompt) + len(completion) for prompt, completion in sequences)
    input_ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    scored = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(sequences):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion)
        scored[row, len(prompt) - 1 : end - 1] = True
    return Batch(input_ids.to(device), scored.to(device))


def in_order(pairs: list[Pair], size: int, device: torch.device) -> list[Batch]:
    """All pairs once, in batches of at most ``size``."""
    return [make_batch(pairs[i : i + size], device) for i in range(0, len(pairs), size)]


def shuffled(pairs: list[Pair], size: int, seed: int, device: torch.device) -> Iterator[Batch]:
    """Batches of ``size`` (or all pairs, if fewer) without end; every pair comes once before any comes again."""
    order, generator = [], random.Random(seed)
    size = min(size, len(pairs))
    while True:
        while len(order) < size:
            order += generator.sample(pairs, len(pairs))
        yield make_batch(order[:size], device)
        order = order[size:]


def _continuation(prompt: str, completion: str) -> str:
    """The completion, set off from the prompt by a space if neither brings one."""
    return completion if prompt[-1].isspace() or completion[0].isspace() else f" {completion}"
