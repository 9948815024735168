"""What is checked before a trainer writes anything: the arguments, the model and the rows of the data."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import ProcessorMixin

from fused_pref import validate
from fused_pref.output_head import find_head

TEXTS = ("prompt", "chosen", "rejected", "completion")


def check_model(model: Any) -> None:
    """A model that is there already must have a head that can be used; one given by name is checked when loaded.

    Raises:
        ValueError, TypeError: as :func:`fused_pref.models.find_head`.
    """
    if isinstance(model, nn.Module):
        find_head(model)
    elif not isinstance(model, str):
        raise TypeError(f"model must be a transformers model, or the name of one; got {type(model).__name__}")


def check_reference(ref_model: Any) -> None:
    """A reference model must have a head that can be used, too.

    Raises:
        ValueError, TypeError: as :func:`fused_pref.models.find_head`.
    """
    if ref_model is None:
        return
    try:
        find_head(ref_model)
    except (ValueError, TypeError) as error:
        raise type(error)(f"ref_model is of no use: {error}") from error


def check_args(args: Any, needed: type) -> None:
    """The configuration must be of the trainer's kind, without what would replace the forward.

    Raises:
        TypeError: another class, or a length that is no integer.
        ValueError: Liger's fused cross-entropy is asked for, or a length below 1.
    """
    if not isinstance(args, needed):
        raise TypeError(f"args must be a {needed.__name__}; got {type(args).__name__}")
    validate.at_least("max_length", args.max_length, 1, optional=True)
    if args.use_liger_kernel and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy") is not False:
        raise ValueError(
            "use_liger_kernel=True replaces the model's forward by Liger's fused cross-entropy; set "
            'liger_kernel_config={"fused_linear_cross_entropy": False} to keep its other kernels'
        )


def check_devices(args: Any, model: nn.Module) -> None:
    """One process must not run several replicas of the model.

    Raises:
        ValueError: ``Trainer`` would wrap the model in ``nn.DataParallel``.
    """
    if args.n_gpu > 1 and len({*getattr(model, "hf_device_map", {}).values()}) < 2:
        raise ValueError(
            f"nn.DataParallel over {args.n_gpu} GPUs is not supported; start one process for each GPU (accelerate "
            "launch, torchrun) or show this one a single GPU (CUDA_VISIBLE_DEVICES)"
        )


def check_tokenizer(processing_class: Any) -> None:
    """Batches are padded with the tokenizer's own token.

    Raises:
        ValueError: it has none.
    """
    # A tokenizer may have a `tokenizer` too, which is another library's.
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    if tokenizer is not None and getattr(tokenizer, "pad_token", None) is None:
        raise ValueError(
            "processing_class must have a pad token; set processing_class.pad_token, often to its eos_token; got "
            f"{type(processing_class).__name__}"
        )


def check_rows(
    name: str,
    dataset: Any,
    forms: Sequence[tuple[str, ...]],
    kinds: tuple[type, ...] = (Dataset, IterableDataset),
    parts: type[dict] | None = None,
) -> None:
    """A dataset must have rows of one of the forms, each column a text or a list of messages, or a boolean label.

    Args:
        name: of the argument.
        dataset: one of the kinds (of an IterableDataset the first row alone is looked at), or None.
        forms: the columns that a row must have, one tuple for each form.
        kinds: of datasets that the trainer takes.
        parts: of dictionaries whose datasets it takes, too.

    Raises:
        TypeError: not a dataset.
        ValueError: no rows, missing columns, or a malformed row.
    """
    if dataset is None:
        return
    if parts is not None and isinstance(dataset, parts):
        for key, part in dataset.items():
            check_rows(f"{name}[{key!r}]", part, forms, kinds)
        return
    if not isinstance(dataset, kinds):
        allowed = " or ".join(f"datasets.{kind.__name__}" for kind in kinds)
        allowed += "" if parts is None else f", or a {parts.__name__} of them"
        raise TypeError(f"{name} must be a {allowed}; got {type(dataset).__name__}")
    first = next(iter(dataset), None)
    columns = list(dataset.column_names or first or ())
    wanted = next((form for form in forms if set(form) <= set(columns)), None)
    if wanted is None and columns:
        choice = " or ".join(", ".join(form) for form in forms)
        raise ValueError(f"{name} must have the columns {choice}; got {', '.join(columns)}")
    if wanted is None or first is None:
        raise ValueError(f"{name} must have at least one row; got none")
    checked = [column for column in (*TEXTS, "label") if column in columns and (column == "prompt" or column in wanted)]
    rows = dataset.select_columns(checked)
    for number, row in enumerate(rows if isinstance(dataset, Dataset) else rows.take(1)):
        _check_row(f"{name}[{number}]", row)


def check_scored(name: str, scored: Any, max_length: int | None) -> None:
    """Truncation must leave a token to score.

    Args:
        name: of the dataset.
        scored: for each row, whether it has one.
        max_length: what the rows were cut to.

    Raises:
        ValueError: no row has one.
    """
    if not any(scored):
        raise ValueError(
            f"no row of {name} has a completion token left to score: max_length={max_length} is no more than its "
            "prompts; raise max_length or shorten the prompts"
        )


def _check_row(place: str, row: Any) -> None:
    kinds = set()
    for column, value in row.items():
        if column == "label":
            if not isinstance(value, bool):
                raise ValueError(f"{place}['label'] must be true or false; got {value!r}")
        elif isinstance(value, str):
            kinds.add("text")
        elif isinstance(value, list) and value and all(_is_message(message) for message in value):
            kinds.add("messages")
        else:
            raise ValueError(f"{place}[{column!r}] must be a text or a list of messages; got {str(value)[:40]!r}")
    if len(kinds) > 1:
        raise ValueError(f"{place} must have texts throughout or messages throughout; got both")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value
