"""A BCO trainer on the data pipeline of TRL's KTO trainer."""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from trl.data_utils import is_conversational
from trl.trainer.kto_trainer import KTOTrainer

from fused_pref.functional import linear_bco_loss, linear_sequence_logps
from fused_pref.losses.density_ratio import DensityRatio
from fused_pref.models import attach
from fused_pref.trl.base import HeadTrainer, saved
from fused_pref.trl.bco_config import BCOConfig
from fused_pref.trl.checks import check_args, check_causal, check_eos, check_model, check_reference, check_tokenizer
from fused_pref.trl.rows import check_rows, plain_rows
from fused_pref.trl.udm import WEIGHT, PromptWeights, RowCollator, check_prompts_are_there, prompt_texts

RATIO_FILE = "density_ratio.safetensors"
FORMS = (("prompt", "completion", "label"), ("chosen", "rejected"))
SIDES = ("chosen", "rejected")
# What a batch holds beside the model's inputs; TRL's vision collator may add KL completions, which BCO does not use.
TRAINER_INPUTS = ("completion_mask", "label", "ref_logps", "ref_KL_logps", WEIGHT)


class BCOTrainer(KTOTrainer, HeadTrainer):
    """Binary classifier optimisation (arXiv 2404.04656) that never makes logits.

    Data, collator, reference model and its cached log-probs are those of TRL's ``KTOTrainer``. The objective is
    :func:`fused_pref.linear_bco_loss`, the reward shift δ a :class:`fused_pref.RewardShift`, saved with checkpoints.

    Args:
        model: a causal language model, or the name of one.
        ref_model: the reference; None: the model without its adapters, with precomputed log-probs the model before
            training, else a deep copy of the model (of one given by name, the same once more).
        args: None: ``BCOConfig()`` with an output folder named after the model.
        train_dataset: rows of ``prompt``, ``completion`` and ``label`` (true: desirable), or of ``prompt``, ``chosen``
            and ``rejected``, which become two; texts or messages; with ``image`` or ``images``, for a processor.
        eval_dataset: the same, or a dictionary of them.
        embedding_func: for underlying distribution matching: embeddings (n, E) of n prompts, from a list of texts, or
            with ``embedding_tokenizer`` from its ``input_ids`` and ``attention_mask``. Before training it gets the
            prompt of every undesirable row, and of the desirable ones that are drawn, once.
        embedding_tokenizer: see there.
        data_collator, processing_class, compute_metrics, callbacks, optimizers, quantization_config, peft_config: as
            for TRL's ``KTOTrainer``; ``compute_metrics`` gets the rewards as predictions and the labels.

    Raises:
        ValueError, TypeError: malformed rows, nothing to train on, a model without a usable head, a tokenizer with
            neither a pad nor an EOS token, ``nn.DataParallel``, Liger's forward; before training, with nothing written.
    """

    model: Any

    _tag_names = ["trl", "bco"]  # noqa: RUF012
    _name = "BCO"
    _paper = {  # noqa: RUF012
        "title": "Binary Classifier Optimization for Large Language Model Alignment",
        "id": "2404.04656",
    }

    def __init__(
        self,
        model: Any,
        ref_model: nn.Module | None = None,
        args: BCOConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        embedding_func: Callable[..., Tensor] | None = None,
        embedding_tokenizer: Any = None,
        data_collator: Any = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        check_model(model)
        check_reference(ref_model)
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path or type(model).__name__
            args = BCOConfig(f"{name.split('/')[-1]}-BCO")
        check_args(args, BCOConfig)
        check_tokenizer(processing_class)
        check_rows("train_dataset", train_dataset, FORMS)
        check_rows("eval_dataset", eval_dataset, FORMS, parts=dict)
        check_causal("BCOTrainer", model)
        self.reward_shift = args.shift()
        self.exact_accumulation, self.memory_budget = args.exact_accumulation, args.memory_budget
        self.density_ratio: DensityRatio | None = None
        self.prompt_weights: PromptWeights | None = None
        if embedding_func is None and embedding_tokenizer is not None:
            raise ValueError("embedding_tokenizer needs embedding_func; got None")
        if embedding_func is not None:
            check_prompts_are_there(train_dataset)
            self.density_ratio = DensityRatio(min_ratio=args.min_density_ratio, max_ratio=args.max_density_ratio)
            batch = args.per_device_train_batch_size
            self.prompt_weights = PromptWeights(
                embedding_func, embedding_tokenizer, self.density_ratio, batch, args.device
            )
        if ref_model is None and isinstance(model, nn.Module) and peft_config is None and not is_peft_model(model):
            ref_model = None if args.precompute_ref_log_probs else copy.deepcopy(model)
        if ref_model is not None:
            attach(ref_model)
        super().__init__(
            model=model,  # type: ignore[arg-type]
            ref_model=ref_model,  # type: ignore[arg-type]
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self.data_collator = RowCollator(self.data_collator)

    def scored(self, row: dict[str, Any]) -> bool:
        """Whether a tokenised row has a token to score; rows with images are tokenised later, and taken as they are."""
        if "completion_ids" not in row:
            return True
        return len(row["completion_ids"]) > 0 and len(row["prompt_ids"]) + len(row["completion_ids"]) > 1

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Sequences."""
        return {"sequence_normalizer": torch.tensor(len(batch["label"]))}

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """TRL's tokenised rows, with their weights where prompts are matched."""
        dataset = plain_rows(dataset)
        first: Any = next(iter(dataset))
        if not is_conversational(first):
            check_eos(self._tokenizer)
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if self.prompt_weights is None or WEIGHT in first:
            return dataset

        def weigh(rows: dict[str, list[Any]]) -> dict[str, list[float]]:
            return {WEIGHT: weights.weights(prompt_texts(rows["prompt"], processing_class), rows["label"])}

        weights = self.prompt_weights
        if isinstance(dataset, IterableDataset):
            return dataset.map(weigh, batched=True, batch_size=args.per_device_eval_batch_size)
        if dataset_name != "train":
            return dataset.add_column(WEIGHT, weigh(dataset)[WEIGHT])
        prompts = prompt_texts(dataset["prompt"], processing_class)
        return dataset.add_column(WEIGHT, weights.fit(prompts, dataset["label"], args.prompt_sample_size, args.seed))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if WEIGHT not in self._signature_columns:
            self._signature_columns.append(WEIGHT)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, None]:
        """Log-probs (S,) of the completions of a batch under the reference, and no KL log-probs."""
        with self.as_reference(model):
            logps, _ = self._preference(linear_sequence_logps, model, inputs).run(model, _model_inputs(inputs))
        return logps.to(self.accelerator.device), None

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """BCO loss of a batch (0-d, differentiable); its metrics are kept for :meth:`log`."""
        device = self.accelerator.device
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        mode = "train" if self.model.training else "eval"
        desirable = batch["label"].bool()
        if self.precompute_ref_logps:
            ref_logps = batch["ref_logps"]
        else:
            reference: Any = self.model if self.ref_model is None else self.ref_model
            ref_logps, _ = self.compute_ref_log_probs(reference, batch)
        keywords = {"beta": self.beta, "delta": self.reward_shift, "sample_weight": self._weights(batch, desirable)}
        keywords |= self.normalizers if mode == "train" else {}
        self.reward_shift.train(mode == "train")
        model_inputs = _model_inputs(batch)
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        preference = self._preference(linear_bco_loss, model, batch, desirable, ref_logps, **keywords)
        output, aux_loss = preference.run(model, model_inputs)
        loss = output.loss.to(device)
        self._keep(output, desirable, mode)
        if self.aux_loss_enabled and aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss.to(device)
            gathered: Any = self.accelerator.gather_for_metrics(aux_loss)
            self._metrics[mode]["aux_loss"].append(gathered.mean().item())
        return (loss, output) if return_outputs else loss

    def _weights(self, batch: dict[str, Any], desirable: Tensor) -> Tensor | None:
        """(S,) factors on the losses: of the classes, and of the prompts."""
        weights = batch.get(WEIGHT)
        if self.desirable_weight == self.undesirable_weight == 1.0:
            return weights
        classes = torch.where(desirable, self.desirable_weight, self.undesirable_weight)
        return classes if weights is None else classes * weights

    def _keep(self, output: Any, desirable: Tensor, mode: str) -> None:
        """Sums and counts of a batch over all ranks, which are gathered and waited for once."""
        logits = torch.where(desirable, output.chosen_logits_mean, output.rejected_logits_mean)
        columns = (desirable, output.rewards, output.logps, logits, output.delta.expand_as(output.rewards))
        rows = torch.stack([column.double().to(self.accelerator.device) for column in columns], 1)
        gathered: Any = self.accelerator.gather_for_metrics(rows.detach())
        chosen, *values, delta = gathered.cpu().unbind(1)
        metrics = self._metrics[mode]
        metrics["delta"].append(delta.mean().item())
        for side, members in zip(SIDES, (chosen == 1, chosen == 0), strict=True):
            metrics[f"count/{side}"].append(members.sum().item())
            for name, value in zip(("rewards", "logps", "logits"), values, strict=True):
                metrics[f"{name}/{side}_sum"].append(value[members].sum().item())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the means over all sequences since the last time; a class that had none is left out."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for side in SIDES:
            count = sum(metrics.pop(f"count/{side}", []))
            for name in ("rewards", "logps", "logits"):
                total = sum(metrics.pop(f"{name}/{side}_sum", []))
                if count:
                    metrics[f"{name}/{side}"] = [total / count]
        if all(f"rewards/{side}" in metrics for side in SIDES):
            metrics["rewards/margins"] = [metrics["rewards/chosen"][0] - metrics["rewards/rejected"][0]]
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, rewards (S,) and labels (S,) of a batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, output = self.compute_loss(model, inputs, return_outputs=True)
        return (loss, None, None) if prediction_loss_only else (loss, output.rewards, inputs["label"])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.density_ratio is not None:
            save_file(self.density_ratio.state_dict(), os.path.join(output_dir, RATIO_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.density_ratio is not None:
            there, fitted = saved(checkpoint, RATIO_FILE), self.density_ratio.state_dict()
            if not all(torch.equal(there[name], fitted[name]) for name in fitted):
                raise ValueError(
                    f"the density ratio in {checkpoint} is not the one of this dataset, seed and embedding_func, by "
                    "which the prompts have been weighed"
                )


def _model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """All that a collator gives for the model: ids and mask, positions, token types, pictures, ..."""
    return {name: value for name, value in batch.items() if name not in TRAINER_INPUTS and not name.startswith("KL_")}
