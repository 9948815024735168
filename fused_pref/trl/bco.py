"""A BCO trainer on the data pipeline of TRL's KTO trainer."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from datasets import IterableDataset
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from fused_pref.functional import linear_bco_loss
from fused_pref.losses.density_ratio import DensityRatio
from fused_pref.trl.base import saved
from fused_pref.trl.bco_config import BCOConfig
from fused_pref.trl.udm import WEIGHT, PromptWeights, check_prompts_are_there, prompt_texts
from fused_pref.trl.unpaired import MEANS, SIDES, UnpairedTrainer

RATIO_FILE = "density_ratio.safetensors"


class BCOTrainer(UnpairedTrainer):
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

    columns = (WEIGHT,)
    configs = (BCOConfig, BCOConfig)

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
        config: Any = self.checked(model, ref_model, args, train_dataset, eval_dataset, processing_class)
        self.reward_shift = config.shift()
        self.take_options(config)
        self.density_ratio: DensityRatio | None = None
        self.prompt_weights: PromptWeights | None = None
        if embedding_func is None and embedding_tokenizer is not None:
            raise ValueError("embedding_tokenizer needs embedding_func; got None")
        if embedding_func is not None:
            check_prompts_are_there(train_dataset)
            self.density_ratio = DensityRatio(min_ratio=config.min_density_ratio, max_ratio=config.max_density_ratio)
            batch = config.per_device_train_batch_size
            self.prompt_weights = PromptWeights(
                embedding_func, embedding_tokenizer, self.density_ratio, batch, config.device
            )
        super().__init__(
            model,
            ref_model,
            config,
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

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """TRL's tokenised rows, with their weights where prompts are matched."""
        first: Any = next(iter(dataset))
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

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """BCO loss of a batch (0-d, differentiable); its metrics are kept for :meth:`log`."""
        batch, training = self._on_device(inputs), self.model.training
        desirable = batch["label"].bool()
        ref_logps, _ = self._ref_log_probs(batch)
        self.reward_shift.train(training)
        keywords = {"beta": self.beta, "delta": self.reward_shift, "sample_weight": self._weights(batch, desirable)}
        output, aux_loss = self._scores(linear_bco_loss, model, batch, desirable, ref_logps, **keywords)
        self._keep(output, aux_loss)
        return (output.loss, output) if return_outputs else output.loss

    def _rows(self, batch: dict[str, Any]) -> int:
        """Repeats do not count in evaluation, nor with ``exact_accumulation``."""
        return self.units(batch) if self.model.training and not self.exact_accumulation else self.own(self.units(batch))

    def _weights(self, batch: dict[str, Any], desirable: Tensor) -> Tensor | None:
        """(S,) factors on the losses: of the classes, and of the prompts."""
        weights = batch.get(WEIGHT)
        if self.desirable_weight == self.undesirable_weight == 1.0:
            return weights
        classes = torch.where(desirable, self.desirable_weight, self.undesirable_weight)
        return classes if weights is None else classes * weights

    def _keep(self, output: Any, aux_loss: Tensor | None) -> None:
        """Sums and counts of a batch over all ranks."""
        logits_mean = torch.where(output.desirable, output.chosen_logits_mean, output.rejected_logits_mean)
        sums = self._sums(output, output.rewards, logits_mean, output.desirable)
        each = {"ranks": torch.ones(()), "delta": output.delta}
        each |= {} if aux_loss is None else {"aux_loss": aux_loss}
        numbers = self._over_ranks({**sums, **each}, self.accelerator.gather)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in each.keys() - {"ranks"}:
            metrics[name].append(numbers[name] / numbers["ranks"])
        for name in sums:
            metrics[f"{name}_sum"].append(numbers[name])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the means over all sequences since the last time; a class that had none is left out."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for side in SIDES:
            totals = {name: sum(metrics.pop(f"{name}/{side}_sum", [])) for name in ("count", "tokens", *MEANS)}
            for name, over in MEANS.items():
                if totals[over]:
                    metrics[f"{name}/{side}"] = [totals[name] / totals[over]]
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
        # Repeats that are left out come last, and are cut off where the rewards are gathered.
        rewards = F.pad(output.rewards, (0, self.units(inputs) - len(output.rewards)))
        return (loss, None, None) if prediction_loss_only else (loss, rewards, inputs["label"])

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
