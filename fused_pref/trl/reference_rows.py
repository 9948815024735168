"""Training rows with the log-probs of the reference from a file, in place of a pass of the reference over them."""

from typing import Any

from datasets import Dataset
from torch import nn
from trl.trainer.base_trainer import _BaseTrainer

from fused_pref.trl.reference_file import (
    KL_LOGPS,
    LOGPS,
    ReferenceFile,
    adapter_counts,
    numbered,
    read,
    row_settings,
    weights_hash,
)

ANY = "ref_logps_any_model=True"


class ReferenceRows(_BaseTrainer):
    """Comes before TRL's trainer in the order of classes. Without a file TRL does as ever.

    Attributes:
        ref_columns: of log-probs of the reference that the rows have where they are precomputed.
        reference_file: those of the training rows, or None.
    """

    ref_columns: tuple[str, ...]
    reference_file: ReferenceFile | None = None
    ref_model: Any
    _any_model: bool = False
    _given_reference: nn.Module | None = None
    _rows_attached: bool = False
    _tokenizer: Any

    def take_file(self, args: Any, ref_model: nn.Module | None, train_dataset: Any, eval_dataset: Any) -> None:
        """Read the file that a configuration names.

        Raises:
            ValueError: it is no such file, or does not go with the other arguments.
        """
        path = getattr(args, "ref_logps_file", None)
        if path is None:
            return
        if not isinstance(train_dataset, Dataset) or {"image", "images"} & set(train_dataset.column_names):
            raise ValueError("ref_logps_file needs a train_dataset that is a datasets.Dataset without pictures")
        there = [name for name in LOGPS if name in train_dataset.column_names]
        if there:
            raise ValueError(f"train_dataset must not have columns of log-probs beside ref_logps_file; got {there[0]}")
        self.reference_file = read("ref_logps_file", path)
        self._any_model, self._given_reference = args.ref_logps_any_model, ref_model
        if eval_dataset is not None:
            self._check_evaluation(ref_model)

    def _check_evaluation(self, ref_model: nn.Module | None) -> None:
        """Of evaluation rows, the log-probs are the trainer's to compute.

        Raises:
            ValueError: it has no reference, since the file may be of another model than the one that is trained.
        """
        if self._any_model and ref_model is None:
            raise ValueError(f"an eval_dataset needs a ref_model beside {ANY}, to compute its log-probs; got None")

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """TRL's tokenised rows; of those to train on, which come first, with their log-probs."""
        parent: Any = super()
        if self.reference_file is None or self._rows_attached:
            return parent._prepare_dataset(dataset, processing_class, args, dataset_name)
        self._rows_attached = True
        self.reference_file.check_columns(self.ref_columns)
        self.reference_file.check_settings(self.row_settings(args, next(iter(dataset)), processing_class))
        rows = parent._prepare_dataset(numbered(dataset), processing_class, args, dataset_name)
        return self.reference_file.attached("train_dataset", rows, self.ref_columns)

    def row_settings(self, args: Any, first: dict[str, Any], processing_class: Any) -> dict[str, Any]:
        """What makes the log-probs of rows, beside the model; see :func:`reference_file.row_settings`."""
        settings = row_settings(args, first, processing_class, self._tokenizer)
        return settings | ({"kl_batch_size": args.per_device_train_batch_size} if KL_LOGPS in self.ref_columns else {})

    def check_reference_weights(self, model: nn.Module) -> None:
        """The file must be of the reference that the trainer would make itself.

        Args:
            model: as it will be trained.

        Raises:
            ValueError: it is of another model.
        """
        if self.reference_file is None or self._any_model:
            return
        reference, header = self._given_reference, self.reference_file.header
        if reference is None and adapter_counts(model):
            raise ValueError(
                "ref_logps_file must be of the reference, which is the model with the adapter that it came with; got "
                f"the file of a model without adapters, which {ANY} takes"
            )
        here = weights_hash(model if reference is None else reference)
        if here not in (None, header.get("weights")):
            raise ValueError(
                f"ref_logps_file must be of the reference, whose weights have the hash {here!r}; got the file of "
                f"{header.get('model')!r} with {header.get('weights')!r}, which {ANY} takes"
            )

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """TRL's, of rows that have no log-probs from a file."""
        if self.reference_file is not None:
            if set(self.ref_columns) <= set(dataset.column_names or ()):
                return dataset
            self._check_evaluation(self.ref_model)
        parent: Any = super()
        return parent._precompute_ref_logps(dataset, name, batch_size)
