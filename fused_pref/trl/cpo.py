"""A CPO trainer that takes the place of TRL's."""

import inspect
import warnings
from typing import Any, Literal

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn

from fused_pref.functional import linear_cpo_loss
from fused_pref.models import Preference, virtual_tokens
from fused_pref.modules import LinearCPOLoss
from fused_pref.trl.base import HeadTrainer, of_first
from fused_pref.trl.checks import check_args, check_eos, check_model, check_tokenizer
from fused_pref.trl.rows import check_rows
from fused_pref.trl.stock import StockCPOConfig, StockCPOTrainer

HYPERPARAMETERS = ("beta", "loss_type", "label_smoothing", "cpo_alpha", "simpo_gamma", "alpha")
# TRL's steps from logits to the loss; a subclass that changes one of them wants it called.
STEPS = ("concatenated_forward", "get_batch_logps", "cpo_loss")


class CPOTrainer(StockCPOTrainer, HeadTrainer):
    """``trl.experimental.cpo.CPOTrainer`` that never makes logits: same arguments, data, metrics and names.

    The objective is :func:`fused_pref.linear_cpo_loss`, computed inside of the model's forward. A subclass that
    overrides ``cpo_loss``, ``get_batch_logps`` or ``concatenated_forward`` gets TRL's own path, and a warning. Where
    TRL has no such module, rows and batches are made here, for causal language models.

    Args:
        *args, **kwargs: those of TRL's trainer; ``args`` is its ``CPOConfig`` or :class:`fused_pref.trl.CPOConfig`.
        exact_accumulation: see :class:`fused_pref.trl.CPOConfig`; None: what ``args`` says.
        memory_budget: see :class:`fused_pref.trl.CPOConfig`; None: what ``args`` says.

    Raises:
        ValueError, TypeError: malformed rows, nothing to train on, a model without a usable head, a tokenizer with
            neither a pad nor an EOS token, ``nn.DataParallel``, Liger's forward; before training, with nothing written.
    """

    is_encoder_decoder: Any
    pad_token_id: Any

    def __init__(
        self,
        *args: Any,
        exact_accumulation: bool | None = None,
        memory_budget: int | None = None,
        **kwargs: Any,
    ) -> None:
        given = inspect.signature(StockCPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        config = given.get("args")
        check_args(config, StockCPOConfig)
        check_tokenizer(given.get("processing_class"), text_only=True)
        # TRL's trainer maps its datasets, which a plain dictionary of them cannot.
        for name, parts in (("train_dataset", None), ("eval_dataset", DatasetDict)):
            check_rows(name, given.get(name), [("chosen", "rejected")], kinds=(Dataset,), parts=parts, each=True)
        there = [name for name in STEPS if hasattr(type(self), name)]
        changed = [name for name in there if getattr(type(self), name) is not getattr(StockCPOTrainer, name, None)]
        self.head = not changed
        if changed and len(there) < len(STEPS):
            raise ValueError(f"{changed[0]} is overridden, which is a step of trl.experimental.cpo; this TRL has none")
        if changed:
            warnings.warn(
                f"{type(self).__name__} overrides {', '.join(changed)}: the logits are made, for TRL's own loss",
                stacklevel=2,
            )
        else:
            check_model(given.get("model"))
        self.take_options(config, exact_accumulation=exact_accumulation, memory_budget=memory_budget)
        # Constructed for what it refuses.
        LinearCPOLoss(**{name: getattr(config, name) for name in HYPERPARAMETERS})
        if self.exact_accumulation and changed:
            raise ValueError(f"exact_accumulation needs this trainer's own loss; {', '.join(changed)} is overridden")
        super().__init__(*args, **kwargs)

    def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:
        """TRL's row of token ids."""
        if not self.is_encoder_decoder:
            check_eos(self.processing_class)
        return super().tokenize_row(feature, model)

    def scored(self, row: dict[str, Any]) -> bool:
        """Whether a completion of a tokenised row has a token to score."""
        first = 0 if self.is_encoder_decoder else 1
        return any(label != -100 for side in ("chosen", "rejected") for label in row[f"{side}_labels"][first:])

    def units(self, batch: dict[str, Any]) -> int:
        """Pairs."""
        return len(batch["chosen_labels"])

    def counts(self, batch: dict[str, Any], units: int) -> dict[str, Tensor]:
        """Pairs, and chosen tokens that are scored."""
        labels = batch["chosen_labels"][:units, 0 if self.is_encoder_decoder else 1 :]
        return {"pair_normalizer": torch.tensor(len(labels)), "token_normalizer": (labels != -100).sum()}

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: Literal["train", "eval"] = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        """CPO loss of a batch (0-d, differentiable) and its metrics over all ranks, under TRL's names."""
        if not self.head:
            return super().get_batch_loss_metrics(model, batch, train_eval)
        device = self.accelerator.device
        stacked: dict[str, Any] = self.concatenated_inputs(batch, self.is_encoder_decoder, self.pad_token_id, device)
        labels = stacked["concatenated_labels"]
        inputs: dict[str, Any] = {
            "input_ids": stacked["concatenated_input_ids"],
            "attention_mask": stacked["concatenated_attention_mask"],
        }
        if self.is_encoder_decoder:
            inputs["decoder_input_ids"] = self._shift_right(labels)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        keywords = {
            # TRL's trainer takes them over from its arguments, simpo_gamma for simpo only.
            **{name: getattr(self, name) for name in HYPERPARAMETERS if hasattr(self, name)},
            "shift": not self.is_encoder_decoder,
            "memory_budget": self.memory_budget,
        }
        pairs = self.units(batch)
        own = self.own(pairs) if self.exact_accumulation else pairs
        if train_eval == "train":
            keywords |= self.normalizers
        elif self.exact_accumulation:
            keywords |= self._evaluation_normalizers(batch, own)
        loss = of_first(linear_cpo_loss, own, pairs)
        preference = Preference(loss, (labels,), keywords, virtual_tokens(model), **self.packing(batch))
        output, aux_loss = preference.run(model, inputs)
        loss = output.loss.to(device)
        if self.aux_loss_enabled and aux_loss is not None:
            loss = loss + self.aux_loss_coef * aux_loss.to(device)
        prefix = "eval_" if train_eval == "eval" else ""
        metrics = self._of_step(output, keywords) if self.exact_accumulation else self._gathered(output)
        return loss, {prefix + name: value for name, value in metrics.items()}

    def _of_step(self, output: Any, keywords: dict[str, Any]) -> dict[str, float]:
        """Metrics over the pairs and tokens of all microbatches of a step and all ranks, with its last microbatch."""
        number = len(output.chosen_rewards)
        tokens = output.lengths[:number].sum()
        sums = {name: values.double().sum() for name, values in _of_pairs(output).items()}
        sums |= {f"logits/{side}": number * getattr(output, f"{side}_logits_mean") for side in ("rejected", "chosen")}
        sums |= {"nll_loss": output.nll_loss * keywords.get("token_normalizer", tokens)}
        numbers = self._pooled({**sums, "pairs": tokens.new_full((), number), "tokens": tokens})
        tokens, pairs = numbers.pop("tokens", 0.0), numbers.pop("pairs", 0.0)
        return {name: value / max(tokens if name == "nll_loss" else pairs, 1) for name, value in numbers.items()}

    def _gathered(self, output: Any) -> dict[str, float]:
        """Metrics over the pairs of all ranks, which are gathered and waited for once."""
        pairs = _of_pairs(output)
        means = {
            "logits/rejected": output.rejected_logits_mean,
            "logits/chosen": output.chosen_logits_mean,
            "nll_loss": output.nll_loss,
        }
        values = [torch.stack(list(pairs.values()), 1).flatten(), torch.stack(list(means.values()))]
        mine = torch.cat(values).detach().to(self.accelerator.device)
        gathered: Any = self.accelerator.gather(mine[None])  # (ranks, B pairs of 6 values, then 3)
        of_pairs = gathered[:, : -len(means)].reshape(-1, len(pairs))
        of_ranks = gathered[:, -len(means) :]
        numbers = torch.cat([self.kept(rows).mean(0) for rows in (of_pairs, of_ranks)]).tolist()
        return dict(zip((*pairs, *means), numbers, strict=True))


def _of_pairs(output: Any) -> dict[str, Tensor]:
    """Metric → its values (B,)."""
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "rewards/margins": chosen - rejected,
        "logps/rejected": output.rejected_logps,
        "logps/chosen": output.chosen_logps,
    }
