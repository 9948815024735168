"""What the trainers on TRL's row pipelines share: arguments checked, rows as stored, and what of a batch is whose."""

import inspect
from typing import Any, ClassVar

from accelerate.utils import is_peft_model
from torch import nn
from trl.data_utils import is_conversational

from fused_pref.trl.checks import check_args, check_causal, check_eos, check_model, check_reference, check_tokenizer
from fused_pref.trl.reference_rows import ReferenceRows
from fused_pref.trl.rows import check_rows, plain_rows

# The arguments of a trainer that :meth:`RowTrainer.checked` looks at.
CHECKED = ("model", "ref_model", "args", "train_dataset", "eval_dataset", "processing_class")


class RowTrainer(ReferenceRows):
    """Comes before TRL's trainer in the order of classes.

    Attributes:
        configs: the configuration that is made where none is given, and the class of those that are taken.
        forms: the columns that a row must have, one tuple for each form.
        trainer_inputs: what a batch holds beside the model's inputs and the ``columns``.
        columns: of the rows that a batch has beside TRL's, as tensors.
    """

    configs: ClassVar[tuple[Any, type]]
    forms: ClassVar[tuple[tuple[str, ...], ...]]
    trainer_inputs: ClassVar[tuple[str, ...]]
    columns: tuple[str, ...] = ()
    _name: Any
    _tokenizer: Any
    _signature_columns: Any

    def arguments(self, stock: type, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What the trainer was given, by the names of TRL's arguments.

        Raises:
            TypeError: an argument that TRL's trainer does not take, such as an option of the configuration.
        """
        try:
            given = inspect.signature(stock).bind(*args, **kwargs)
        except TypeError as error:
            config = self.configs[0]
            options = [name for name in kwargs if name in config.__dataclass_fields__]
            hint = f"; {', '.join(options)} of fused_pref.trl.{config.__name__} is meant" if options else ""
            raise TypeError(f"{type(self).__name__}() {error}{hint}") from None
        return given.arguments

    def checked(
        self, model: Any, ref_model: Any, args: Any, train_dataset: Any, eval_dataset: Any, processing_class: Any
    ) -> Any:
        """The configuration: the one that is given, or the default one with an output folder named after the model.

        Raises:
            ValueError, TypeError: an argument is of no use.
        """
        made, taken = self.configs
        check_model(model)
        check_reference(ref_model)
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path or type(model).__name__
            args = made(f"{name.split('/')[-1]}-{self._name}")
        check_args(args, taken, liger=True)
        check_tokenizer(processing_class)
        check_rows("train_dataset", train_dataset, self.forms)
        check_rows("eval_dataset", eval_dataset, self.forms, parts=dict)
        check_causal(f"{self._name}Trainer", model)
        self.take_file(args, ref_model, train_dataset, eval_dataset)
        return args

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """TRL's tokenised rows."""
        dataset = plain_rows(dataset)
        if not is_conversational(next(iter(dataset))):
            check_eos(self._tokenizer)
        parent: Any = super()
        return parent._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self.columns if name not in self._signature_columns]

    def _model_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """All that a collator gives for the model: ids and mask, positions, token types, pictures, ..."""
        others = (*self.trainer_inputs, *self.columns)
        return {name: value for name, value in batch.items() if name not in others}


def is_own_reference(model: Any, ref_model: Any, args: Any, peft_config: Any) -> bool:
    """Whether the reference is a model object as it is before training: neither given, adapters nor precomputed."""
    alone = isinstance(model, nn.Module) and not is_peft_model(model)
    return alone and ref_model is None and peft_config is None and not args.precompute_ref_log_probs
