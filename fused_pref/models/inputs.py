"""What a transformers model needs beside the ids of a batch: decoder inputs made of labels, positions when packed."""

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_pref import validate
from fused_pref.models.probe import check_packing


def with_decoder_inputs(model: Any, inputs: Mapping[str, Any], labels: Tensor) -> dict[str, Any]:
    """Inputs of an encoder-decoder; ``decoder_input_ids`` are the labels, shifted right, unless they are there.

    Args:
        model: a transformers model.
        inputs: of its forward.
        labels: (S, T), -100 where not scored.

    Raises:
        ValueError: decoder inputs are missing and cannot be made.
    """
    if "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs:
        return dict(inputs)
    try:
        shifted = _shifted_right(model, labels)
    except ValueError as error:
        raise ValueError(
            f"batch must have decoder_input_ids: {type(model).__name__} cannot make them from the labels, {error}"
        ) from error
    return {**inputs, "decoder_input_ids": shifted}


def _shifted_right(model: Any, labels: Tensor) -> Tensor:
    """By the model's own rule where it has one: mBART begins with the last token."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        # They fail in ways of their own where the configuration has no token to begin with.
        with contextlib.suppress(Exception):
            return model.prepare_decoder_input_ids_from_labels(labels)
    start, pad = _token(model, "decoder_start_token_id"), _token(model, "pad_token_id")
    shifted = labels.roll(1, -1)
    shifted[..., 0] = start
    return shifted.masked_fill_(shifted == -100, pad)


def _token(model: Any, name: str) -> int:
    """A token of the configuration, or of that for generation."""
    for config in (model.config, getattr(model, "generation_config", None)):
        token = getattr(config, name, None)
        if isinstance(token, int):
            return token
    raise ValueError(f"its configuration has no {name}")


def with_positions(model: Any, inputs: Mapping[str, Any], labels: Tensor, cu_seqlens: Any) -> dict[str, Any]:
    """Inputs of packed sequences; ``position_ids`` begin at 0 in each of them, unless they are there.

    transformers keeps sequences apart by their positions where there is no mask. Whether this model does is seen once.

    Args:
        model: a transformers model.
        inputs: of its forward; ``input_ids`` (1, N_total).
        labels: (N_total,) or (1, N_total).
        cu_seqlens: (S+1,).

    Raises:
        ValueError, TypeError: a malformed entry; a mask; a model that does not keep packed sequences apart.
    """
    total = labels.numel()
    if isinstance(cu_seqlens, Tensor):
        validate.boundaries("cu_seqlens", cu_seqlens, total, cu_seqlens.device)
    else:
        raise validate.fail("cu_seqlens", "an int32 or int64 tensor (S+1,)", cu_seqlens, TypeError)
    inputs = dict(inputs)
    for entry in ("input_ids", "inputs_embeds"):
        rows = inputs.get(entry)
        if isinstance(rows, Tensor) and tuple(rows.shape[:2]) != (1, total):
            raise validate.fail(entry, f"(1, N_total = {total}, ...) with cu_seqlens", rows)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return inputs  # of the user's own making
    if isinstance(mask, Tensor) and not bool((mask == 1).all()):
        expected = "left out with cu_seqlens, all ones, or a mask of 4 dimensions: packed sequences have no padding"
        raise validate.fail("attention_mask", expected, mask)
    inputs.pop("attention_mask", None)
    check_packs(model)
    positions = inputs.get("position_ids")
    if positions is None:
        inputs["position_ids"] = _positions(cu_seqlens, total)
    elif isinstance(positions, Tensor) and tuple(positions.shape) == (1, total) and validate.readable(positions):
        _check_positions(positions[0], cu_seqlens)
    return inputs


def check_packs(model: Any) -> None:
    """See once that a model keeps packed sequences apart, with the attention that it has.

    Raises:
        ValueError: it does not.
    """
    if model.config.is_encoder_decoder or "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise ValueError(
            "cu_seqlens needs a model that keeps packed sequences apart by position_ids, which "
            f"{type(model).__name__} does not take; pad the sequences instead (see docs/packed.md)"
        )
    if getattr(model, "_packs", None) != model.config._attn_implementation:
        check_packing(model)
        model._packs = model.config._attn_implementation


def without_padding(
    model: Any, inputs: Mapping[str, Any], padded: Mapping[str, Tensor | None]
) -> tuple[dict[str, Any], Tensor, dict[str, Tensor]]:
    """Inputs of a padded batch as one row of its tokens, the boundaries of the sequences, and more tensors as the row.

    The host waits for the number of tokens.

    Args:
        model: a transformers model that keeps packed sequences apart.
        inputs: of its forward, among them ``attention_mask`` (S, T).
        padded: (S, T) each, ``labels`` among them; None is left out.

    Raises:
        ValueError, TypeError: as :func:`with_positions`.
    """
    mask = inputs["attention_mask"].bool()
    lengths = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    row = {
        name: value[mask][None] if isinstance(value, Tensor) and value.shape[:2] == mask.shape else value
        for name, value in inputs.items()
        if name not in ("attention_mask", "position_ids")
    }
    parts = {name: tensor.to(mask.device)[mask] for name, tensor in padded.items() if tensor is not None}
    return with_positions(model, row, parts["labels"], lengths), lengths, parts


def _check_positions(positions: Tensor, cu_seqlens: Tensor) -> None:
    """Positions (N_total,) tell a model where a sequence begins: there, and only there, they do not rise by one."""
    begins = torch.zeros(positions.numel() + 1, dtype=torch.bool, device=positions.device)
    begins[cu_seqlens.long()] = True
    rises = positions.diff() == 1
    wrong = (rises == begins[1:-1]).nonzero()
    if wrong.numel():
        at = int(wrong[0]) + 1
        raise ValueError(
            "position_ids must rise by one within each sequence of cu_seqlens and start anew in the next; got "
            f"{positions[at - 1].item()} and {positions[at].item()} at {at - 1} and {at}"
        )


def _positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """(1, N_total): from 0 in each sequence."""
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=total)
    return (torch.arange(total, device=cu_seqlens.device) - starts)[None]
