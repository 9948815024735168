"""A KTO trainer that takes the place of TRL's."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.kto_config import KTOConfig as StockKTOConfig
from trl.trainer.kto_trainer import KTOTrainer as StockKTOTrainer

from fused_pref import validate
from fused_pref.functional import linear_kto_loss
from fused_pref.losses.unpaired import KTO_LOSS_TYPES
from fused_pref.modules import LinearKTOLoss
from fused_pref.preference import LinearPreferenceLoss
from fused_pref.trl.columns import check_columns
from fused_pref.trl.kto_config import KTOConfig
from fused_pref.trl.row_trainer import CHECKED
from fused_pref.trl.unpaired import MEANS, SIDES, UnpairedTrainer

HYPERPARAMETERS = ("beta", "loss_type", "desirable_weight", "undesirable_weight")
# TRL's loss that needs no KL term.
WITHOUT_KL = "apo_zero_unpaired"
# What an objective of one's own can ask for beside the columns of the rows.
GIVEN = ("desirable", "label", "kl")


class KTOTrainer(UnpairedTrainer):
    """``trl.KTOTrainer`` that never makes logits: same arguments, data, metrics and names.

    The objective is :func:`fused_pref.linear_kto_loss`, computed inside of the model's forward, its gradient formed
    there. Hyperparameters that it does not take, such as a ``beta`` of 0, take TRL's own path, with a warning.

    Args:
        *args, **kwargs: those of TRL's trainer; ``args`` is its ``KTOConfig`` or :class:`fused_pref.trl.KTOConfig`. The
            reference of a model that is given is a deep copy of it, where there are neither adapters nor a
            ``ref_model`` nor precomputed log-probs.
        objective: the loss in place of KTO: a function of ``fp.Sequences`` and tensors that gives the losses (s,) of s
            sequences, see :func:`fused_pref.linear_preference_loss` with ``unit=1``. The names of its parameters are
            columns of the rows, or ``desirable`` (s,) bool, ``label`` (s,), or ``kl``, TRL's estimate, 0-d.
        exact_accumulation: see :class:`fused_pref.trl.KTOConfig`; None: what ``args`` says.
        memory_budget: see :class:`fused_pref.trl.KTOConfig`; None: what ``args`` says.

    Raises:
        ValueError, TypeError: malformed rows, nothing to train on, a model without a usable head, a tokenizer with
            neither a pad nor an EOS token, ``nn.DataParallel``, Liger's cross-entropy; before training, with nothing
            written.
    """

    configs = (KTOConfig, StockKTOConfig)
    own_loss: LinearPreferenceLoss | None = None

    def __init__(
        self,
        *args: Any,
        objective: Callable[..., Tensor] | None = None,
        exact_accumulation: bool | None = None,
        memory_budget: int | None = None,
        **kwargs: Any,
    ) -> None:
        given = self.arguments(StockKTOTrainer, *args, **kwargs)
        config = self.checked(**{name: given.get(name) for name in CHECKED})
        self.take_options(config, exact_accumulation=exact_accumulation, memory_budget=memory_budget)
        validate.choice("loss_type", config.loss_type, KTO_LOSS_TYPES)
        reason = None if objective is not None else _refusal(config)
        self.head = reason is None
        if reason is not None and self.exact_accumulation:
            raise ValueError(f"exact_accumulation needs this trainer's own loss; TRL's is used: {reason}")
        if objective is not None:
            self.own_loss = LinearPreferenceLoss(objective, unit=1, logits_mean="completion", token_metrics=True)
            self.columns = tuple(name for name in self.own_loss.tensor_names if name not in GIVEN)
            for name in ("train_dataset", "eval_dataset"):
                if given.get("data_collator") is None:
                    check_columns(name, given.get(name), self.columns)
            if "kl" not in self.own_loss.tensor_names:
                config = copy.copy(config)
                config.loss_type = WITHOUT_KL
        # With exact accumulation: the KL term of a step.
        self.step_kl: Any = None
        given["args"] = config
        super().__init__(**given)
        if reason is not None:
            warnings.warn(f"TRL's own loss is used: {reason}", stacklevel=2)

    def counts(self, batch: dict[str, Any], units: int) -> dict[str, Tensor]:
        """Sequences."""
        return {"sequence_normalizer" if self.own_loss is None else "normalizer": torch.tensor(units)}

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """TRL's tokenised rows; with ``exact_accumulation`` KL completions are of rows of the same optimiser step."""
        if self.exact_accumulation:
            args = copy.copy(args)
            args.per_device_train_batch_size *= args.gradient_accumulation_steps * args.world_size
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _normalizers(self, batches: list[Any]) -> dict[str, Tensor]:
        """Those of the loss; the KL term is made for the whole step, too."""
        if self.calculate_KL:
            with self.compute_loss_context_manager():
                self.step_kl = self._pooled_kl(self.model_wrapped, batches)
        return super()._normalizers(batches)

    def _log_ratios(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """(S,) of the KL completions, policy over reference; the batch gets its reference log-probs."""
        there = self._on_device(batch)
        ref_logps, ref_KL_logps = self._ref_log_probs(there)
        batch.update(ref_logps=ref_logps, ref_KL_logps=ref_KL_logps)
        logps: Any = self._compute_kl_logps(model, there)
        return logps - ref_KL_logps

    def _kl(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """TRL's estimate of the KL divergence, 0-d in nats: the mean over ranks of mean log-ratios, at least 0."""
        mean: Any = self.accelerator.gather_for_metrics(self._log_ratios(model, batch).mean())
        return mean.mean().clamp(min=0)

    def _pooled_kl(self, model: nn.Module, batches: list[dict[str, Any]]) -> Tensor:
        """The same as one mean over some microbatches, of which only the last may have repeats, and ranks."""
        ratios = [self._log_ratios(model, batch).double() for batch in batches]
        ratios[-1] = ratios[-1][: self._rows(batches[-1])]
        pooled = torch.cat(ratios)
        total, count = self.accelerator.reduce(torch.stack([pooled.sum(), pooled.new_full((), len(pooled))]))
        return (total / count.clamp(min=1)).clamp(min=0)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """KTO loss of a batch (0-d, differentiable); its metrics are kept for :meth:`log`."""
        if not self.head:
            return super()._compute_loss(model, inputs, return_outputs)
        batch = self._on_device(inputs)
        desirable = batch["label"].bool()
        kl: Any = batch["completion_mask"].new_zeros((), dtype=torch.float32)
        if self.calculate_KL and not self.exact_accumulation:
            kl = self._kl(model, batch)
        elif self.calculate_KL:
            kl = self.step_kl if self.model.training else self._pooled_kl(model, [batch])
        ref_logps, _ = self._ref_log_probs(batch)
        if self.own_loss is None:
            hyperparameters = {name: getattr(self, name) for name in HYPERPARAMETERS}
            output, aux_loss = self._scores(
                linear_kto_loss, model, batch, desirable, ref_logps, kl=kl, token_metrics=True, **hyperparameters
            )
        else:
            given = {**batch, "desirable": desirable, "kl": kl}
            tensors = tuple(given[name] for name in self.own_loss.tensor_names)
            output, aux_loss = self._scores(self.own_loss.call, model, batch, *tensors, ref_logps=ref_logps)
        self._keep(output, batch, kl, ref_logps, aux_loss)
        if not return_outputs:
            return output.loss
        # For `compute_metrics`, which TRL gives the logits.
        with torch.no_grad():
            return output.loss, model(**self._model_inputs(batch), use_cache=False)

    def _keep(self, output: Any, batch: dict[str, Any], kl: Tensor, ref_logps: Tensor, aux_loss: Tensor | None) -> None:
        """Metrics of a batch over all ranks, under TRL's names; with ``exact_accumulation`` of all those of a step."""
        mode, own = ("train" if self.model.training else "eval"), len(output.logps)
        desirable = batch["label"].bool()[:own]
        if self.own_loss is None:
            rewards = output.rewards
            logits_mean = torch.where(desirable, output.chosen_logits_mean, output.rejected_logits_mean)
        else:
            rewards = self.beta * (output.logps - ref_logps[:own])
            logits_mean = output.logits_mean
        each = {"ranks": torch.ones(()), "kl": kl, "num_tokens": batch["attention_mask"][:own].sum()}
        each["entropy"] = (output.entropy.double() * output.lengths).sum()
        each |= {} if aux_loss is None else {"aux_loss": aux_loss}
        sums = {**self._sums(output, rewards, logits_mean, desirable), **each}
        if self.exact_accumulation:
            numbers = self._pooled(sums)
        else:  # TRL's means are over what `gather_for_metrics` keeps
            numbers = self._over_ranks(sums, self.accelerator.gather_for_metrics)
        if numbers:
            self._log_means(numbers, mode)

    def _log_means(self, numbers: dict[str, float], mode: str) -> None:
        metrics = self._metrics[mode]
        for name in numbers.keys() & {"kl", "aux_loss"}:
            metrics[name].append(numbers[name] / numbers["ranks"])
        tokens = sum(numbers[f"tokens/{side}"] for side in SIDES)
        metrics["entropy"].append(numbers["entropy"] / tokens if tokens else 0.0)
        if mode == "train":
            self._total_train_tokens += int(numbers["num_tokens"]) // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]
        for side in SIDES:
            for name, over in MEANS.items():
                if numbers[f"{over}/{side}"]:
                    metrics[f"{name}/{side}"].append(numbers[f"{name}/{side}"] / numbers[f"{over}/{side}"])
        if all(numbers[f"count/{side}"] for side in SIDES):
            chosen, rejected = (metrics[f"rewards/{side}"][-1] for side in SIDES)
            metrics["rewards/margins"].append(chosen - rejected)


def _refusal(config: Any) -> str | None:
    """Why a configuration of TRL's does not go with the loss."""
    try:
        LinearKTOLoss(**{name: getattr(config, name) for name in HYPERPARAMETERS})
    except (ValueError, TypeError) as error:
        return str(error)
    return None
