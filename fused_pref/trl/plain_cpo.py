"""What the CPO trainer stands on where TRL has no CPO of its own: the same arguments, rows, metrics and names."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import disable_dropout_in_model, get_config_model_id, global_then_local_main_first

from fused_pref.trl.checks import check_causal
from fused_pref.trl.cpo_rows import PairCollator, stacked_sides, tokenized_pair

# Tokens of a sequence with `max_length=None`.
MAX_LENGTH = 512
NEEDED = "need a TRL with trl.experimental.cpo, such as TRL 1.16"


@dataclass
class PlainCPOConfig(_BaseConfig):
    """The fields of ``CPOConfig`` of TRL 1.16."""

    _VALID_DICT_FIELDS = [*_BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate for AdamW."})
    max_length: int | None = field(default=1024, metadata={"help": "Tokens of a sequence, with its prompt."})
    max_completion_length: int | None = field(default=None, metadata={"help": "Of encoder-decoders; without effect."})
    beta: float = field(default=0.1, metadata={"help": "Factor on log-prob differences."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Probability that a preference is flipped."})
    loss_type: str = field(
        default="sigmoid",
        metadata={"help": "The preference term.", "choices": ["sigmoid", "hinge", "ipo", "simpo", "alphapo"]},
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Whether to disable dropout in the model."})
    cpo_alpha: float = field(default=1.0, metadata={"help": "Weight of the NLL of the chosen completions."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "Target margin of simpo."})
    alpha: float = field(default=0.0, metadata={"help": "AlphaPO's exponent; 0: log-probs as they are."})
    generate_during_eval: bool = field(default=False, metadata={"help": "Not supported: leave it."})
    is_encoder_decoder: bool | None = field(default=None, metadata={"help": "Not supported: leave it."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keywords of `from_pretrained` for a model given by name."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether models may run their own code."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise the dataset."})

    def __post_init__(self) -> None:
        if self.loss_type == "alphapo":
            self.loss_type, self.cpo_alpha = "simpo", 0.0
        if self.generate_during_eval or self.is_encoder_decoder:
            raise ValueError(f"generate_during_eval and is_encoder_decoder {NEEDED}; got True")
        super().__post_init__()


class PlainCPOTrainer(_BaseTrainer):
    """TRL's CPO trainer without a loss, for causal language models and texts or conversations.

    Its arguments are those of TRL 1.16's.

    Raises:
        ValueError: an encoder-decoder.
    """

    model: Any

    loss_is_scaled_for_ga = False
    is_encoder_decoder = False

    _tag_names = ["trl", "cpo"]  # noqa: RUF012
    _name = "CPO"
    _paper = {  # noqa: RUF012
        "title": "Contrastive Preference Optimization: "
        "Pushing the Boundaries of LLM Performance in Machine Translation",
        "id": "2401.08417",
    }

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: Any = None,
        compute_metrics: Any = None,
    ) -> None:
        # Adapters begin with random weights.
        set_seed(args.seed)
        revision = (args.model_init_kwargs or {}).get("revision")
        model = _prepared(model, args, peft_config)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(
                get_config_model_id(model.config), revision=revision, trust_remote_code=args.trust_remote_code
            )
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        self.pad_token_id = processing_class.pad_token_id
        model.config.get_text_config().pad_token_id = self.pad_token_id
        model.generation_config.pad_token_id = self.pad_token_id
        if data_collator is None:
            data_collator, args.remove_unused_columns = PairCollator(self.pad_token_id), False
        for name in ("beta", "loss_type", "label_smoothing", "cpo_alpha", "alpha"):
            setattr(self, name, getattr(args, name))
        if args.loss_type == "simpo":
            self.simpo_gamma = args.simpo_gamma
        self.max_length = MAX_LENGTH if args.max_length is None else args.max_length
        self.aux_loss_enabled = getattr(model.config, "output_router_logits", False)
        self.aux_loss_coef = getattr(model.config, "router_aux_loss_coef", 0.0)
        self._stored_metrics: Any = defaultdict(lambda: defaultdict(list))
        self.processing_class = processing_class
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=self._tokenized(train_dataset, args),
            eval_dataset=None if eval_dataset is None else self._tokenized(eval_dataset, args),
            processing_class=processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.model.add_model_tags(self._tag_names)

    def _tokenized(self, dataset: Any, args: Any) -> Any:
        with global_then_local_main_first():
            dataset = dataset.map(maybe_extract_prompt, num_proc=args.dataset_num_proc)
            template = {"processing_class": self.processing_class}
            dataset = dataset.map(maybe_apply_chat_template, fn_kwargs=template, num_proc=args.dataset_num_proc)
            return dataset.map(self.tokenize_row, num_proc=args.dataset_num_proc)

    def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:
        """A row of token ids."""
        return tokenized_pair(feature, self.processing_class, self.max_length)

    @staticmethod
    def concatenated_inputs(
        batch: Any, is_encoder_decoder: bool = False, padding_value: int = 0, device: Any = None
    ) -> dict[str, Tensor]:
        """The chosen and the rejected sequences of a batch, (2B, T)."""
        return stacked_sides(batch, padding_value, device)

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: Any = "train") -> tuple[Tensor, Any]:
        """Loss of a batch (0-d, differentiable), and its metrics."""
        raise NotImplementedError

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a batch; its metrics are kept for :meth:`log`."""
        loss, metrics = self.get_batch_loss_metrics(model, inputs, train_eval="train")
        self.store_metrics(metrics, "train")
        return (loss, metrics) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, means of the logits of the chosen and of the rejected sequences, and zeros as labels."""
        with torch.no_grad():
            loss, metrics = self.get_batch_loss_metrics(model, inputs, train_eval="eval")
        self.store_metrics(metrics, "eval")
        if prediction_loss_only:
            return loss.detach(), None, None
        ignored = getattr(model.config, "keys_to_ignore_at_inference", []) if ignore_keys is None else ignore_keys
        names = [f"eval_logits/{side}" for side in ("chosen", "rejected")]
        logits = torch.tensor([metrics[name] for name in names if name not in ignored], device=loss.device)
        return loss.detach(), logits, torch.zeros_like(logits)

    def store_metrics(self, metrics: dict[str, float], train_eval: Any = "train") -> None:
        """Keep the metrics of a batch."""
        for name, value in metrics.items():
            self._stored_metrics[train_eval][name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the means of what has been kept."""
        kept = self._stored_metrics.pop("train" if "loss" in logs else "eval", {})
        super().log({**logs, **{name: torch.tensor(values).mean().item() for name, values in kept.items()}}, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name: Any = self.args.hub_model_id or self.args.output_dir
        self.create_model_card(model_name=Path(name).name)
        super()._save_checkpoint(model, trial)


def _prepared(model: Any, args: Any, peft_config: Any) -> Any:
    """The model that is trained: loaded where it is a name, with an adapter, gradients of its inputs, no dropout."""
    if isinstance(model, str):
        options = {**({"device_map": "auto"} if args.model_init_kwargs else {}), **(args.model_init_kwargs or {})}
        model = AutoModelForCausalLM.from_pretrained(model, **{"trust_remote_code": args.trust_remote_code, **options})
    elif args.model_init_kwargs is not None:
        raise ValueError("model_init_kwargs is for a model given by name; the model is there already")
    try:
        check_causal("CPOTrainer", model)
    except ValueError as error:
        raise ValueError(f"{error}; encoder-decoders {NEEDED}") from error
    if peft_config is not None:
        from peft import PeftConfig, get_peft_model, prepare_model_for_kbit_training

        if not isinstance(peft_config, PeftConfig):
            raise TypeError(f"peft_config must be a peft.PeftConfig, got {type(peft_config).__name__}")
        if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
        model = get_peft_model(model, peft_config)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    if args.disable_dropout:
        disable_dropout_in_model(model)
    return model
