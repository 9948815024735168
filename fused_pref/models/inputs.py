"""What a transformers model needs beside the ids of a batch: decoder inputs made of labels, positions when packed."""

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_pref import validate
from fused_pref.models.packing import (
    FLASH_ATTN_KWARGS,
    boundaries_of,
    flash_attn_kwargs,
    is_flash_attention,
    lay_out,
)
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


def with_positions(
    model: Any, inputs: Mapping[str, Any], labels: Tensor, cu_seqlens: Any, token_index: Any = None
) -> dict[str, Any]:
    """Inputs of packed sequences; ``position_ids`` begin at 0 in each of them, unless they are there.

    transformers keeps sequences apart by their positions where there is no mask. Whether this model does is seen once.

    Args:
        model: a transformers model.
        inputs: of its forward; ``input_ids`` (1, N_total), or with ``token_index`` (R, L).
        labels: (N_total,) or (1, N_total).
        cu_seqlens: (S+1,).
        token_index: (N_total,) int64, the place of each token among the R·L; then ``position_ids`` (R, L) are there.

    Raises:
        ValueError, TypeError: a malformed entry; a mask; a model that does not keep packed sequences apart.
    """
    total = labels.numel()
    if isinstance(cu_seqlens, Tensor):
        validate.boundaries("cu_seqlens", cu_seqlens, total, cu_seqlens.device)
    else:
        raise validate.fail("cu_seqlens", "an int32 or int64 tensor (S+1,)", cu_seqlens, TypeError)
    flash = is_flash_attention(model)
    inputs = {name: value for name, value in inputs.items() if flash or name not in FLASH_ATTN_KWARGS}
    positions, shape = inputs.get("position_ids"), (1, total)
    if token_index is not None:
        shape = _check_index(token_index, positions, total, cu_seqlens)
    for entry in ("input_ids", "inputs_embeds"):
        rows = inputs.get(entry)
        if isinstance(rows, Tensor) and tuple(rows.shape[:2]) != shape:
            names = (
                "(1, N_total = {1}, ...) with cu_seqlens" if token_index is None else "({}, {}, ...) as position_ids"
            )
            raise validate.fail(entry, names.format(*shape), rows)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return inputs  # of the user's own making
    if isinstance(mask, Tensor) and not bool((mask == 1).all()):
        expected = "left out with cu_seqlens, all ones, or a mask of 4 dimensions: packed sequences have no padding"
        raise validate.fail("attention_mask", expected, mask)
    inputs.pop("attention_mask", None)
    check_packs(model, shape[0])
    if flash and shape[0] > 1 and not all(name in inputs for name in FLASH_ATTN_KWARGS):
        raise ValueError(
            f"batch must have {', '.join(FLASH_ATTN_KWARGS)}, which flash-attention needs for several rows"
        )
    if positions is None:
        inputs["position_ids"] = _positions(cu_seqlens, total)
    elif token_index is None and isinstance(positions, Tensor) and tuple(positions.shape) == shape:
        _check_positions(positions[0], cu_seqlens)
    return inputs


def _check_index(token_index: Any, positions: Any, total: int, cu_seqlens: Tensor) -> tuple[int, int]:
    """The shape (R, L) of the rows in which ``token_index`` says where each token is.

    Raises:
        ValueError, TypeError: a malformed entry; on a CPU also places that are none, or positions that do not rise
            from 0 in each sequence.
    """
    if not isinstance(token_index, Tensor):
        raise validate.fail("token_index", "an int64 tensor (N_total,)", token_index, TypeError)
    if token_index.dtype != torch.int64 or tuple(token_index.shape) != (total,):
        raise validate.fail("token_index", f"an int64 tensor (N_total = {total},)", token_index)
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        raise validate.fail("position_ids", "a tensor (R, L) with token_index", positions)
    if validate.readable(token_index) and validate.readable(positions):
        if total and not 0 <= int(token_index.min()) <= int(token_index.max()) < positions.numel():
            raise validate.fail("token_index", f"places among the R·L = {positions.numel()}", token_index)
        own, expected = positions.flatten()[token_index], _positions(cu_seqlens, total)[0]
        if wrong := (own != expected).nonzero().flatten().tolist():
            raise ValueError(
                "position_ids[token_index] must rise from 0 in each sequence of cu_seqlens; got "
                f"{int(own[wrong[0]])} in place of {int(expected[wrong[0]])} at {wrong[0]}"
            )
    return positions.shape[0], positions.shape[1]


def check_packs(model: Any, rows: int = 1) -> None:
    """See once that a model keeps packed sequences apart, with the attention that it has, in one row or in several.

    Raises:
        ValueError: it does not.
    """
    if model.config.is_encoder_decoder or "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise ValueError(
            "cu_seqlens needs a model that keeps packed sequences apart by position_ids, which "
            f"{type(model).__name__} does not take; pad the sequences instead (see docs/packed.md)"
        )
    tried = (model.config._attn_implementation, rows > 1)
    if tried not in getattr(model, "_packs", ()):
        check_packing(model, min(rows, 2))
        model._packs = (*getattr(model, "_packs", ()), tried)


def without_padding(
    model: Any, inputs: Mapping[str, Any], padded: Mapping[str, Tensor | None], row_tokens: int | None = None
) -> tuple[dict[str, Any], Tensor, Tensor | None, dict[str, Tensor]]:
    """Inputs of a padded batch as rows without padding.

    The host waits for the lengths of the sequences.

    Args:
        model: a transformers model that keeps packed sequences apart.
        inputs: of its forward, among them ``attention_mask`` (S, T).
        padded: (S, T) each, ``labels`` among them; None is left out.
        row_tokens: the most tokens of a row, as :func:`lay_out` takes it; None: one row.

    Returns:
        The inputs, ``cu_seqlens`` (S+1,), ``token_index`` (N_total,) or None where there is one row, and the padded
        tensors as (N_total,).

    Raises:
        ValueError, TypeError: as :func:`with_positions`.
    """
    mask = inputs["attention_mask"].bool()
    counts, device = mask.sum(1), mask.device
    lengths, cu_seqlens = counts.tolist(), boundaries_of(counts)
    # Which of the S·T are tokens; the host knows how many, and need not wait for them.
    tokens = mask.flatten().sort(descending=True, stable=True).indices[: sum(lengths)]
    layout = lay_out(lengths, row_tokens)
    places = tokens[layout.tokens.to(device)]

    def laid_out(value: Any) -> Any:
        padded_rows = isinstance(value, Tensor) and value.shape[:2] == mask.shape
        return value.flatten(0, 1)[places] if padded_rows else value

    left_out = ("attention_mask", "position_ids")
    rows = {name: laid_out(value) for name, value in inputs.items() if name not in left_out}
    rows["position_ids"] = layout.positions.to(device)
    if is_flash_attention(model):
        rows |= flash_attn_kwargs(layout.boundaries.to(device), max(lengths))
    parts = {name: value.to(device).flatten(0, 1)[tokens] for name, value in padded.items() if value is not None}
    index = None if row_tokens is None else layout.token_index.to(device)
    return with_positions(model, rows, parts["labels"], cu_seqlens, index), cu_seqlens, index, parts


def _check_positions(positions: Tensor, cu_seqlens: Tensor) -> None:
    """Positions (N_total,) tell a model where a sequence begins: there, and only there, they do not rise by one.

    Raises:
        ValueError: they do not tell it; seen on a CPU only.
    """
    if not validate.readable(positions):
        return
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
