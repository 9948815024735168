"""Underlying distribution matching in the BCO trainer: density-ratio weights of the rows of a dataset."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from fused_pref import validate
from fused_pref.losses.density_ratio import DensityRatio, as_tensor

WEIGHT = "sample_weight"


class PromptWeights:
    """Weighs rows by the density ratio of their prompts.

    Args:
        embed: the prompts' embeddings (n, E), as a tensor, a NumPy array or a list of rows: with a tokenizer, a
            function of ``input_ids`` and ``attention_mask`` (n, T), else of a list of n texts.
        tokenizer: of the embedding model, or None.
        ratio: fitted by :meth:`fit`, unless it is fitted already.
        batch_size: prompts embedded at a time.
        device: where the token ids are put.
    """

    def __init__(
        self,
        embed: Callable[..., Any],
        tokenizer: Any,
        ratio: DensityRatio,
        batch_size: int,
        device: torch.device,
    ) -> None:
        if not callable(embed):
            raise validate.fail("embedding_func", "a function that returns embeddings (n, E)", embed, TypeError)
        if tokenizer is not None and not callable(tokenizer):
            raise validate.fail("embedding_tokenizer", "a tokenizer or None", tokenizer, TypeError)
        self.embed, self.ratio = embed, ratio
        self.tokenizer: Any = tokenizer
        self.batch_size, self.device = batch_size, device

    def fit(self, prompts: list[str], desirable: Sequence[Any], sample_size: int, seed: int) -> list[float]:
        """Fit the ratio on at most ``sample_size`` prompts of each class, drawn without replacement by the seed.

        Returns:
            What :meth:`weights` says of these rows, by the same embeddings.
        """
        generator = torch.Generator().manual_seed(seed)
        members = torch.tensor([bool(label) for label in desirable])
        wanted, others = members.nonzero().flatten(), (~members).nonzero().flatten()
        wanted = wanted[torch.randperm(len(wanted), generator=generator)[:sample_size]]
        drawn = torch.randperm(len(others), generator=generator)[:sample_size]
        embeddings = self._embeddings([prompts[row] for row in (*wanted.tolist(), *others.tolist())])
        rest = embeddings[len(wanted) :]
        classes = torch.arange(len(wanted) + len(drawn)) < len(wanted)
        self.ratio.fit(torch.cat([embeddings[: len(wanted)], rest[drawn]]), classes)
        return torch.ones(len(prompts)).index_copy(0, others, self.ratio(rest)).tolist()

    def weights(self, prompts: list[str], desirable: Sequence[Any]) -> list[float]:
        """ρ of the undesirable rows, 1 for the others, which need no embedding."""
        weights = torch.ones(len(prompts))
        rows = [row for row, label in enumerate(desirable) if not label]
        if rows:
            weights[rows] = self.ratio(self._embeddings([prompts[row] for row in rows]))
        return weights.tolist()

    @torch.no_grad()
    def _embeddings(self, prompts: list[str]) -> Tensor:
        parts = []
        for start in tqdm(range(0, len(prompts), self.batch_size), desc="Embedding prompts", leave=False):
            texts = prompts[start : start + self.batch_size]
            if self.tokenizer is None:
                given = self.embed(texts)
            else:
                tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
                given = self.embed(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            embeddings = as_tensor(given)
            if not isinstance(embeddings, Tensor) or embeddings.dim() != 2 or len(embeddings) != len(texts):
                raise validate.fail(
                    "embedding_func", f"a function that returns ({len(texts)}, E) for {len(texts)} prompts", given
                )
            if parts and embeddings.shape[1] != parts[0].shape[1]:
                raise validate.fail(
                    "embedding_func",
                    f"a function whose E is the same, {parts[0].shape[1]}, for all prompts",
                    embeddings,
                )
            parts.append(embeddings.float().cpu())
        return torch.cat(parts)


def check_prompts_are_there(dataset: Any) -> None:
    """The ratio is fitted on the prompts of all rows before training, as texts.

    Raises:
        ValueError: a stream, or rows with pictures.
    """
    if dataset is not None and not isinstance(dataset, Dataset):
        raise ValueError(
            "embedding_func needs a train_dataset that is a datasets.Dataset, since the weights of prompts are fitted "
            f"on all rows before training, which a stream does not show; got {type(dataset).__name__}"
        )
    pictures = [name for name in ("image", "images") if dataset is not None and name in dataset.column_names]
    if pictures:
        raise ValueError(
            f"embedding_func weighs prompts of text alone; train_dataset must have no pictures; got {pictures[0]}"
        )


def prompt_texts(prompts: list[Any], processing_class: Any) -> list[str]:
    """Prompts as texts; conversations by the chat template."""
    return [
        prompt
        if isinstance(prompt, str)
        else processing_class.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
