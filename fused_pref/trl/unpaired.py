"""What KTO and BCO share: TRL's KTO trainer on checked rows, the head in its forwards, references without noise."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.kto_trainer import KTOTrainer as StockKTOTrainer

from fused_pref.functional import linear_sequence_logps
from fused_pref.models import attach
from fused_pref.trl.base import HeadTrainer, of_first
from fused_pref.trl.columns import RowCollator
from fused_pref.trl.reference_file import KL_LOGPS
from fused_pref.trl.row_trainer import RowTrainer, is_own_reference

SIDES = ("chosen", "rejected")
# Metric of a side → what it is a mean over.
MEANS = {"rewards": "count", "logps": "count", "logits": "tokens"}
# Of the KL completions in a batch.
KL = "KL_"


class UnpairedTrainer(RowTrainer, StockKTOTrainer, HeadTrainer):
    """A trainer on TRL's data pipeline of single sequences. Its subclasses say what the loss is.

    Its arguments are those of TRL's ``KTOTrainer``; a subclass has them :meth:`checked` before.
    """

    model: Any
    model_wrapped: Any
    _tp_size: Any
    forms = (("prompt", "completion", "label"), ("chosen", "rejected"))
    trainer_inputs = ("completion_mask", "label", "ref_logps", KL_LOGPS)

    def __init__(
        self, model: Any, ref_model: Any = None, args: Any = None, *, peft_config: Any = None, **others: Any
    ) -> None:
        if is_own_reference(model, ref_model, args, peft_config):
            ref_model = copy.deepcopy(model)
        if ref_model is not None and self.head:
            attach(ref_model)
        super().__init__(model, ref_model, args, peft_config=peft_config, **others)
        self.data_collator = RowCollator(self.data_collator, self.columns)

    @property
    def ref_columns(self) -> tuple[str, ...]:  # type: ignore[override]
        """See :class:`ReferenceRows`."""
        return ("ref_logps", KL_LOGPS) if self.calculate_KL else ("ref_logps",)

    def scored(self, row: dict[str, Any]) -> bool:
        """Whether a tokenised row has a token to score; rows with images are tokenised later, and taken as they are."""
        if "completion_ids" not in row:
            return True
        return len(row["completion_ids"]) > 0 and len(row["prompt_ids"]) + len(row["completion_ids"]) > 1

    def units(self, batch: dict[str, Any]) -> int:
        """Sequences."""
        return len(batch["label"])

    def counts(self, batch: dict[str, Any], units: int) -> dict[str, Tensor]:
        """Sequences."""
        return {"sequence_normalizer": torch.tensor(units)}

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Log-probs (S,) under the reference: of the completions of a batch, and of its KL completions if there are."""
        if not self.head:
            return super().compute_ref_log_probs(model, inputs)
        with self.as_reference(model):
            return self._logps(model, inputs), self._compute_kl_logps(model, inputs)

    def _compute_kl_logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
        """Log-probs (S,) of the KL completions of a batch, without a gradient; None where the loss has none."""
        if not self.calculate_KL or not self.head:
            return super()._compute_kl_logps(model, batch)
        completions = {name.removeprefix(KL): value for name, value in batch.items() if name.startswith(KL)}
        with torch.no_grad():
            return self._logps(model, {**batch, **completions})

    def _logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        logps, _ = self._preference(linear_sequence_logps, model, batch).run(model, self._model_inputs(batch))
        return logps.to(self.accelerator.device)

    def _ref_log_probs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """As :meth:`compute_ref_log_probs`, unless the batch has them."""
        if "ref_logps" in batch:
            return batch["ref_logps"], batch.get(KL_LOGPS)
        return self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, batch)

    def _model_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Without the KL completions."""
        return {name: value for name, value in super()._model_inputs(batch).items() if not name.startswith(KL)}

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        device = self.accelerator.device
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def _scores(self, loss: Any, model: nn.Module, batch: dict[str, Any], *tensors: Tensor, **given: Any) -> Any:
        """The output of a loss of the batch's own rows, with the router loss in it, and that loss or None."""
        inputs = self._model_inputs(batch)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        loss = of_first(loss, self._rows(batch), self.units(batch))
        keywords = {"logits_mean": "completion", **given, **(self.normalizers if self.model.training else {})}
        output, aux_loss = self._preference(loss, model, batch, *tensors, **keywords).run(model, inputs)
        loss = output.loss.to(self.accelerator.device)
        if not self.aux_loss_enabled or aux_loss is None:
            return output._replace(loss=loss), None
        aux_loss = aux_loss.to(loss.device)
        return output._replace(loss=loss + self.router_aux_loss_coef * aux_loss), aux_loss.detach()

    def whole(self, batch: dict[str, Any]) -> bool:
        """See :class:`HeadTrainer`."""
        return self._rows(batch) == self.units(batch)

    def _rows(self, batch: dict[str, Any]) -> int:
        """The first rows of a batch that count: repeats, with which the last batches of ranks are filled, do or not."""
        return self.own(self.units(batch)) if self.exact_accumulation else self.units(batch)

    def _sums(self, output: Any, rewards: Tensor, logits_mean: Tensor, desirable: Tensor) -> dict[str, Tensor]:
        """Sums over the desirable and the undesirable sequences of a rank: of each metric, and what it is a mean over.

        Args:
            output: of a loss.
            rewards, logits_mean: (S,), the latter over the scored tokens of a sequence, or of all those of its side.
            desirable: (S,) bool.
        """
        sums: dict[str, Tensor] = {}
        columns = {
            "count": torch.ones_like(rewards),
            "tokens": output.lengths,
            "rewards": rewards,
            "logps": output.logps,
            "logits": logits_mean * output.lengths,
        }
        for side, members in zip(SIDES, (desirable, ~desirable), strict=True):
            for name, column in columns.items():
                sums[f"{name}/{side}"] = column.double().where(members, 0).sum()
        return sums
