"""A DPO trainer that takes the place of TRL's."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.dpo_config import DPOConfig as StockDPOConfig
from trl.trainer.dpo_trainer import DPOTrainer as StockDPOTrainer

from fused_pref.functional import linear_sequence_logps
from fused_pref.models import unwrap
from fused_pref.trl.base import HeadTrainer, first_units, of_first
from fused_pref.trl.columns import ColumnCollator, check_columns
from fused_pref.trl.dpo_config import DPOConfig
from fused_pref.trl.dpo_losses import NamedLoss, OwnLoss, StepOutput, named_keywords, refusal, weighted_logps
from fused_pref.trl.row_trainer import CHECKED, RowTrainer, is_own_reference

# Options that an objective of one's own stands for, at their defaults.
REPLACED: dict[str, Any] = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "use_weighting": False,
}


class DPOTrainer(RowTrainer, StockDPOTrainer, HeadTrainer):
    """TRL's ``DPOTrainer`` that never makes logits: same arguments, data, metrics, callbacks and checkpoints.

    The objective is :func:`fused_pref.linear_dpo_loss`, computed inside of the model's forward, its gradient formed
    there. Hyperparameters that it does not take, such as a ``beta`` of 0, take TRL's own path, with a warning.

    Args:
        *args, **kwargs: those of TRL's trainer; ``args`` is its ``DPOConfig`` or :class:`fused_pref.trl.DPOConfig`;
            None: ours, with an output folder named after the model. TRL loads the reference of a model that is given
            by the model's name; one without a name, made from a configuration, gets a deep copy of itself.
        objective: a function of one's own in place of ``loss_type``, as :func:`fused_pref.linear_preference_loss` takes
            it. Its tensors are columns of the dataset, by the names of its parameters: a number, or a list of numbers,
            a pair.
        unit: of the objective: 2, a pair; 1, a sequence, whose columns are those of its pair; None, the batch. With 1
            and None, a tensor named ``desirable`` (2B,) bool says which sequences are chosen ones.

    Raises:
        ValueError, TypeError: malformed rows, nothing to train on, a model without a usable head, an encoder-decoder, a
            tokenizer with neither a pad nor an EOS token, ``nn.DataParallel``; an ``objective`` beside the options that
            it replaces; ``exact_accumulation`` of a loss that is not additive; before training, with nothing written.
    """

    model: Any
    _tp_size: Any
    configs = (DPOConfig, StockDPOConfig)
    forms = (("chosen", "rejected"),)
    ref_columns = ("ref_chosen_logps", "ref_rejected_logps")
    trainer_inputs = ("completion_mask", *ref_columns)

    def __init__(
        self, *args: Any, objective: Callable[..., Tensor] | None = None, unit: int | None = 2, **kwargs: Any
    ) -> None:
        given = self.arguments(StockDPOTrainer, *args, **kwargs)
        config = given["args"] = self.checked(**{name: given.get(name) for name in CHECKED})
        self.take_options(config)
        model = given["model"]
        own = is_own_reference(model, given.get("ref_model"), config, given.get("peft_config"))
        if own and not unwrap(model).config._name_or_path:
            # TRL loads the reference by the model's name.
            given["ref_model"] = copy.deepcopy(model)
        self.delta = getattr(config, "delta_value", 0.0)
        if isinstance(config, DPOConfig) and config.delta_moves:
            self.delta = self.reward_shift = config.shift()
        self.loss: NamedLoss | OwnLoss = _loss(config, objective, unit)
        self.columns = self.loss.columns if isinstance(self.loss, OwnLoss) else ()
        for name in ("train_dataset", "eval_dataset"):
            if self.columns and given.get("data_collator") is None:
                check_columns(name, given.get(name), self.columns)
        reason = refusal(self.loss.keywords) if isinstance(self.loss, NamedLoss) else None
        self.head = reason is None
        if self.exact_accumulation:
            _check_additive(self.loss, config, reason)
        # TRL's trainer says of the option that it is not there.
        packs, config.padding_free = config.padding_free, False
        try:
            super().__init__(**given)
        finally:
            config.padding_free = packs
        if reason is not None:
            warnings.warn(f"TRL's own loss is used: {reason}", stacklevel=2)
        if self.columns:
            self.data_collator = ColumnCollator(self.data_collator, self.columns)

    def scored(self, row: dict[str, Any]) -> bool:
        """Whether a tokenised row has a token to score; rows with images are tokenised later, and taken as they are."""
        if "chosen_ids" not in row:
            return True
        completions = (row["chosen_ids"], row["rejected_ids"])
        return any(len(ids) > 0 and len(row["prompt_ids"]) + len(ids) > 1 for ids in completions)

    def units(self, batch: dict[str, Any]) -> int:
        """Pairs."""
        return len(batch["completion_mask"]) // 2

    def counts(self, batch: dict[str, Any], units: int) -> dict[str, Tensor]:
        """Pairs, and chosen tokens that are scored; of an objective of one's own, its units."""
        if isinstance(self.loss, OwnLoss):
            return {"normalizer": torch.tensor(units if self.loss.unit == 2 else 2 * units)}
        scored = batch["completion_mask"][:units, 1:].sum()
        return {"pair_normalizer": torch.tensor(units), "token_normalizer": scored}

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Log-probs (B,) under the reference, of the chosen and of the rejected completions of a batch."""
        if not self.head:
            return super().compute_ref_log_probs(model, inputs)
        if self.ld_alpha is None:
            preference = self._preference(linear_sequence_logps, model, inputs)
        else:
            preference = self._preference(weighted_logps, model, inputs, token_weight=self._token_weight(inputs))
        with self.as_reference(model):
            logps, _ = preference.run(model, self._model_inputs(inputs))
        return logps.to(self.accelerator.device).chunk(2)

    def _token_weight(self, batch: dict[str, Any]) -> Tensor | None:
        """Shaped like the labels: ``ld_alpha`` beyond the length of the shorter completion of a pair, else 1."""
        if self.ld_alpha is None:
            return None
        mask = batch["completion_mask"][:, 1:]
        chosen, rejected = mask.sum(1).chunk(2)
        shared = torch.minimum(chosen, rejected).repeat(2)
        weight = torch.where(mask.cumsum(1) > shared[:, None], self.ld_alpha, 1.0)
        return nn.functional.pad(weight, (1, 0), value=1.0)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Loss of a batch (0-d, differentiable); its metrics are kept for :meth:`log`."""
        if not self.head:
            return super()._compute_loss(model, inputs, return_outputs)
        training, pairs = self.model.training, self.units(inputs)
        own = self.own(pairs) if self.exact_accumulation else pairs
        if self.precompute_ref_logps:
            sides = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            sides = self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, inputs)
        ref_logps = torch.cat(sides)
        given: dict[str, Any] = {"token_weight": self._token_weight(inputs)}
        if training:
            given |= self.normalizers
        elif self.exact_accumulation:
            given |= self._evaluation_normalizers(inputs, own)
        tensors: tuple[Tensor, ...] = ()
        if isinstance(self.loss, OwnLoss):
            tensors = self.loss.tensors(inputs, pairs)
        else:
            given["delta"] = self.delta
        if self.reward_shift is not None:
            self.reward_shift.train(training)
        model_inputs = self._model_inputs(inputs)
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        preference = self._preference(of_first(self.loss, own, pairs), model, inputs, ref_logps, *tensors, **given)
        output, aux_loss = preference.run(model, model_inputs)
        loss = output.loss.to(self.accelerator.device)
        sums = {"num_tokens": first_units(inputs["attention_mask"], own, pairs).sum()}
        if self.aux_loss_enabled and aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device)
            sums["aux_loss"] = aux_loss
        if output.nll is not None:
            # Over the tokens that it is a mean of.
            tokens = output.lengths[:own].sum()
            sums["nll_loss"] = output.nll * given.get("token_normalizer", tokens).to(tokens.device)
        if self.reward_shift is not None and output.delta is not None:
            sums["delta"] = output.delta
        self._keep(output, first_units(ref_logps, own, pairs), sums)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**model_inputs, use_cache=False)

    def _keep(self, output: StepOutput, ref_logps: Tensor, sums: dict[str, Tensor]) -> None:
        """Metrics under TRL's names, from sums over all ranks; with ``exact_accumulation`` over those of a step."""
        mode = "train" if self.model.training else "eval"
        of_pairs = self._of_pairs(output, ref_logps)
        sums = of_pairs | self._of_tokens(output) | sums | {"batches": torch.ones(())}

        def gather(mine: Tensor) -> Tensor:
            """As TRL, which leaves the tokens of ranks that just fill the last batch out, but not their pairs."""
            rows: Any = self.accelerator.gather(mine)
            parts = (rows[:, : len(of_pairs)], self.kept(rows[:, len(of_pairs) :]))
            return torch.cat([part.sum(0) for part in parts])[None]

        totals = self._pooled(sums) if self.exact_accumulation else self._over_ranks(sums, gather)
        if not totals:
            return
        if mode == "train":
            self._total_train_tokens += int(totals["num_tokens"]) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        chosen, rejected = totals["tokens/chosen"], totals["tokens/rejected"]
        over = dict.fromkeys(of_pairs, totals["pairs"]) | dict.fromkeys(("aux_loss", "delta"), totals["batches"])
        over |= {"entropy": chosen + rejected, "mean_token_accuracy": chosen, "nll_loss": chosen}
        over |= {"logits/chosen": chosen, "logits/rejected": rejected}
        for name in totals.keys() & over.keys() - {"pairs"}:
            self._metrics[mode][name].append(totals[name] / max(over[name], 1))

    def _of_pairs(self, output: StepOutput, ref_logps: Tensor) -> dict[str, Tensor]:
        """Sums over the pairs of a rank, and their number."""
        logps = output.logps.detach().double()
        chosen_logps, rejected_logps = logps.chunk(2)
        chosen, rejected = (self.beta * (logps - ref_logps.to(logps.device))).chunk(2)
        columns = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).double(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": chosen_logps,
            "logps/rejected": rejected_logps,
            "pairs": torch.ones_like(chosen),
        }
        return {name: column.sum() for name, column in columns.items()}

    def _of_tokens(self, output: StepOutput) -> dict[str, Tensor]:
        """Sums over the scored tokens of a rank, and their numbers."""
        chosen, rejected = output.lengths.chunk(2)
        correct, _ = (output.accuracy.double() * output.lengths).chunk(2)
        return {
            "entropy": (output.entropy.double() * output.lengths).sum(),
            "mean_token_accuracy": correct.sum(),
            "tokens/chosen": chosen.sum(),
            "tokens/rejected": rejected.sum(),
            "logits/chosen": output.logits[0],
            "logits/rejected": output.logits[1],
        }


def _loss(config: Any, objective: Callable[..., Tensor] | None, unit: int | None) -> NamedLoss | OwnLoss:
    """The loss that the arguments describe.

    Raises:
        ValueError, TypeError: they do not go together.
    """
    if objective is None:
        if unit != 2:
            raise ValueError(f"unit needs an objective; got {unit!r}")
        loss = NamedLoss(named_keywords(config), config.use_weighting)
        if (
            config.use_weighting
            and getattr(config, "delta_kind", "fixed") != "fixed"
            and config.delta_update == "forward"
        ):
            raise ValueError("use_weighting needs a delta that is known before the batch; got delta_update='forward'")
        return loss
    for name, default in REPLACED.items():
        if getattr(config, name) != default:
            raise ValueError(f"{name} must stay {default!r} beside an objective; got {getattr(config, name)!r}")
    return OwnLoss(objective, unit)


def _check_additive(loss: NamedLoss | OwnLoss, config: Any, reason: str | None) -> None:
    """The losses of microbatches must add up to that of all of them.

    Raises:
        ValueError: they do not.
    """
    why = None if reason is None else f"TRL's own loss is used ({reason})"
    if isinstance(loss, OwnLoss):
        why = "unit=None is a loss of the whole batch" if loss.unit is None else None
    elif matched := [name for name in loss.names if name in ("aot", "aot_unpaired")]:
        why = f"{matched[0]} sorts the pairs of a batch"
    elif loss.weighting and "sft" in loss.names:
        why = "use_weighting multiplies sft by the mean factor of a batch"
    elif config.delta_moves and config.delta_update == "forward":
        why = "delta_update='forward' moves delta between the microbatches"
    if why is not None:
        raise ValueError(
            f"exact_accumulation needs a loss that is a sum over pairs and tokens; {why}; see docs/accumulation.md"
        )
