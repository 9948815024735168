"""What both trainers add between TRL's trainer and transformers': checks, the head in the forward, accumulation."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl.trainer.base_trainer import _BaseTrainer

from fused_pref.models import attach
from fused_pref.trl.checks import check_devices, check_scored, check_tokenizer
from fused_pref.trl.rows import spread


class HeadTrainer(_BaseTrainer):
    """A trainer whose model scores completions in its forward.

    It comes after TRL's trainer in the order of classes: what it is constructed with is the model as it will be trained
    (adapters included) and the tokenised data, before the output folder is made.

    Attributes:
        head: whether the head is attached; else TRL's own loss is used.
        exact_accumulation: whether microbatches and ranks are normalised as one batch.
        memory_budget: bytes of workspace of the head, or None.
    """

    head: bool = True
    exact_accumulation: bool = False
    memory_budget: int | None = None
    # Set by `get_batch_samples` for the microbatches of one optimiser step.
    normalizers: dict[str, Tensor]

    def __init__(
        self, *, model: nn.Module, args: Any, train_dataset: Any, processing_class: Any, **others: Any
    ) -> None:
        check_devices(args, model)
        check_tokenizer(processing_class)
        if isinstance(train_dataset, Dataset):
            # A row here and there, so that long prompts in front do not have all of them read.
            rows = itertools.chain(spread(train_dataset), train_dataset)
            check_scored("train_dataset", map(self.scored, rows), args.max_length)
        # TRL's CPO makes its collator before it gives the tokenizer a pad token.
        collator: Any = others.get("data_collator")
        if getattr(collator, "pad_token_id", 0) is None:
            collator.pad_token_id = processing_class.pad_token_id
        if self.head:
            attach(model)
        self.normalizers = {}
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, processing_class=processing_class, **others
        )

    def scored(self, row: dict[str, Any]) -> bool:
        """Whether a tokenised row has a token to score."""
        raise NotImplementedError

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Name of a normaliser of the loss → its 0-d count in a batch."""
        raise NotImplementedError

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The microbatches of one optimiser step; with ``exact_accumulation`` their counts become its normalisers."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.normalizers = self._normalizers(batches) if self.exact_accumulation and batches else {}
        return batches, items

    def _normalizers(self, batches: list[Any]) -> dict[str, Tensor]:
        """Counts over all microbatches and ranks, over the means that `Trainer` and DDP take of the losses."""
        counts = [self.counts(batch) for batch in batches]
        names = list(counts[0])
        total = torch.stack([torch.stack([count[name].double() for count in counts]).sum() for name in names])
        total = self.accelerator.reduce(total.to(self.accelerator.device), reduction="sum")
        count = self.accelerator.num_processes * len(batches)
        return dict(zip(names, total / count, strict=True))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let a model run without dropout and noise; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
