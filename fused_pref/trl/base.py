"""What the trainers add between TRL's and transformers': checks, the head, references, accumulation, δ."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import use_adapter

from fused_pref import validate
from fused_pref.models import Preference, attach, virtual_tokens
from fused_pref.trl.checks import check_devices, check_padding_free, check_scored, check_tokenizer
from fused_pref.trl.rows import spread

SHIFT_FILE = "reward_shift.safetensors"


class HeadTrainer(_BaseTrainer):
    """A trainer whose model scores completions in its forward.

    It comes after TRL's trainer in the order of classes: what it is constructed with is the model as it will be trained
    (adapters included) and the tokenised data, before the output folder is made.

    Attributes:
        head: whether the head is attached; else TRL's own loss is used.
        exact_accumulation: whether microbatches and ranks are normalised as one batch.
        memory_budget: bytes of workspace of the head, or None.
        packs: whether the model gets batches without padding.
        row_tokens: the most tokens of a row of such a batch; None: one row.
        reward_shift: δ, moved with the optimiser's steps and kept in checkpoints; None where there is none to keep.
    """

    head: bool = True
    exact_accumulation: bool = False
    memory_budget: int | None = None
    packs: bool = False
    row_tokens: int | None = None
    reward_shift: Any = None
    # Set by `get_batch_samples` for the microbatches of one optimiser step: what normalises their losses, and how many
    # of them are still to come.
    normalizers: dict[str, Tensor]
    to_come: int = 0
    # What those that are done have summed up for the metrics.
    unlogged: dict[str, Any]

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
        self.check_reference_weights(model)
        if self.head:
            attach(model)
        self.packs = self.packs and self.head
        if self.packs:
            vision = getattr(self, "_is_vision_dataset", False)
            check_padding_free(model, vision=vision, several_rows=self.row_tokens is not None)
        self.normalizers, self.unlogged = {}, {}
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, processing_class=processing_class, **others
        )
        if self.reward_shift is not None:
            self.reward_shift.to(self.accelerator.device)
            self.add_callback(ShiftCallback(self.reward_shift))

    def check_reference_weights(self, model: nn.Module) -> None:
        """Check what there is of the reference that is not the model's."""

    def take_options(self, config: Any, **given: Any) -> None:
        """Take the options of the head as they are given, else as the configuration says, else the defaults.

        Raises:
            ValueError, TypeError: a malformed value.
        """
        for name in ("exact_accumulation", "memory_budget"):
            value = given.get(name)
            setattr(self, name, getattr(config, name, getattr(type(self), name)) if value is None else value)
        validate.flag("exact_accumulation", self.exact_accumulation)
        validate.at_least("memory_budget", self.memory_budget, 1, optional=True)
        self.packs = getattr(config, "padding_free", False)
        self.row_tokens = getattr(config, "padding_free_tokens", None)

    @property
    def ref_model(self) -> Any:
        """The reference, or None where the model itself is it, without adapters or before training."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, model: Any) -> None:
        # TRL sets it before it is prepared for devices and precision, and again after; the head is attached before.
        if model is not None and self.head:
            attach(model)
        self._ref_model = model

    @contextlib.contextmanager
    def as_reference(self, model: nn.Module) -> Iterator[None]:
        """Let a model run as the reference: without gradients, noise and, where it is the policy, its adapter."""
        adapters: Any = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapters = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        # In evaluation nothing is checkpointed, either.
        with torch.no_grad(), adapters, evaluating(model), self.accelerator.autocast():
            yield

    def _preference(
        self, loss: Callable[..., Any], model: nn.Module, batch: dict[str, Any], *tensors: Tensor, **given: Any
    ) -> Preference:
        """A loss of a batch of TRL's collators, by what it takes after the labels, and by name."""
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        keywords = {"memory_budget": self.memory_budget, **given}
        return Preference(loss, (labels, *tensors), keywords, virtual_tokens(model), **self.packing(batch))

    def packing(self, batch: dict[str, Any]) -> dict[str, Any]:
        """How the model gets a batch; one with repeats that do not count is left padded."""
        return {"padding_free": self.packs and self.whole(batch), "row_tokens": self.row_tokens}

    def whole(self, batch: dict[str, Any]) -> bool:
        """Whether all units of a batch count."""
        units = self.units(batch)
        return not self.exact_accumulation or self.own(units) == units

    def scored(self, row: dict[str, Any]) -> bool:
        """Whether a tokenised row has a token to score."""
        raise NotImplementedError

    def units(self, batch: dict[str, Any]) -> int:
        """Sequences or pairs of a batch."""
        raise NotImplementedError

    def counts(self, batch: dict[str, Any], units: int) -> dict[str, Tensor]:
        """Name of a normaliser of the loss → its 0-d count in the first units of a batch."""
        raise NotImplementedError

    def own(self, units: int) -> int:
        """How many units of this rank's batch, its first ones, do not just fill the last batch of an epoch.

        accelerate repeats rows there, so that all ranks have as many.
        """
        state = self.accelerator.gradient_state
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        alone = self.accelerator.num_processes == 1 or parallelism is not None
        if alone or self.to_come or not state.end_of_dataloader or state.remainder <= 0:
            return units
        return min(max(state.remainder - self.accelerator.process_index * units, 0), units)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The microbatches of one optimiser step; with ``exact_accumulation`` their counts become its normalisers."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.to_come = 0
        self.normalizers = self._normalizers(batches) if self.exact_accumulation and batches else {}
        self.to_come = len(batches)
        return batches, items

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of a microbatch, after its backward."""
        self.to_come = max(self.to_come - 1, 0)
        return super().training_step(*args, **kwargs)

    def _normalizers(self, batches: list[Any]) -> dict[str, Tensor]:
        """Counts over all microbatches and ranks, over the means that `Trainer` and DDP take of the losses."""
        units = [self.units(batch) for batch in batches]
        units[-1] = self.own(units[-1])
        counts = [self.counts(batch, number) for batch, number in zip(batches, units, strict=True)]
        names = list(counts[0])
        total = torch.stack([torch.stack([count[name].double() for count in counts]).sum() for name in names])
        total = self.accelerator.reduce(total.to(self.accelerator.device), reduction="sum")
        count = self.accelerator.num_processes * len(batches)
        return dict(zip(names, total / count, strict=True))

    def _evaluation_normalizers(self, batch: dict[str, Any], own: int) -> dict[str, Tensor]:
        """With them, the mean of the ranks' losses by their own units, as `Trainer` takes it, is that of one batch."""
        if self.accelerator.num_processes == 1:
            return {}
        whole = self._normalizers([batch])
        per_unit = next(iter(whole.values())) / max(own, 1)
        return {name: value / per_unit for name, value in whole.items()}

    def _pooled(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Sums over the microbatches of a step and all ranks, with its last microbatch, and nothing before.

        In evaluation they are those of a batch.
        """
        self.unlogged = {name: value.detach() + self.unlogged.get(name, 0) for name, value in sums.items()}
        if self.to_come:
            return {}
        sums, self.unlogged = self.unlogged, {}
        return self._over_ranks(sums, self.accelerator.gather)

    def _over_ranks(self, sums: dict[str, Tensor], gather: Any) -> dict[str, float]:
        """Sums of all ranks, which are gathered and waited for once."""
        mine = torch.stack([value.detach().double().to(self.accelerator.device) for value in sums.values()])
        return dict(zip(sums, gather(mine[None]).sum(0).tolist(), strict=True))

    def kept(self, rows: Tensor) -> Tensor:
        """As many gathered rows as ``gather_for_metrics`` keeps at the end of an epoch."""
        state = self.accelerator.gradient_state
        return rows[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else rows

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.reward_shift is not None:
            save_file(self.reward_shift.state_dict(), os.path.join(output_dir, SHIFT_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.reward_shift is not None:
            self.reward_shift.load_state_dict(saved(checkpoint, SHIFT_FILE))


class ShiftCallback(TrainerCallback):
    """Moves δ once per optimiser step."""

    def __init__(self, shift: Any) -> None:
        self.shift = shift

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fold in what the microbatches of the step gathered."""
        self.shift.step()


def saved(checkpoint: str, name: str) -> dict[str, Tensor]:
    """Tensors of a file of a checkpoint.

    Raises:
        ValueError: there is no such file.
    """
    path = os.path.join(checkpoint, name)
    if not os.path.isfile(path):
        raise ValueError(f"checkpoint {checkpoint} has no {name}, so that training cannot go on from it")
    return load_file(path)


def first_units(tensor: Tensor, own: int, units: int) -> Tensor:
    """The rows of the first of a batch's units: one each, or one of the chosen and then one of the rejected ones."""
    return tensor if own == units else torch.cat([part[:own] for part in tensor.split(units)])


def of_first(loss: Callable[..., Any], own: int, units: int) -> Callable[..., Any]:
    """A linear loss of the first of a batch's units, which are sequences, or pairs: chosen ones first, then rejected.

    Args:
        loss: of hidden states, a weight, labels and more.
        own: how many units it is of.
        units: of the batch.
    """
    if own == units:
        return loss

    def first(value: Any) -> Any:
        return first_units(value, own, units) if isinstance(value, Tensor) and value.dim() > 0 else value

    def of_those(hidden: Tensor, weight: Tensor, *tensors: Tensor, bias: Tensor | None, **keywords: Any) -> Any:
        keywords = {name: first(value) for name, value in keywords.items()}
        return loss(first(hidden), weight, *map(first, tensors), bias=bias, **keywords)

    return of_those


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
