"""What is checked before a trainer writes anything: the arguments, the model, the tokenizer, what truncation leaves."""

from typing import Any

from torch import nn
from transformers import ProcessorMixin

from fused_pref import validate
from fused_pref.models import unwrap, virtual_tokens
from fused_pref.models.head import find_head
from fused_pref.models.inputs import check_packs


def check_model(model: Any) -> None:
    """A model that is there already must have a head that can be used; one given by name is checked when loaded.

    Raises:
        ValueError, TypeError: as :func:`fused_pref.models.find_head`.
    """
    if isinstance(model, nn.Module):
        find_head(model)
    elif not isinstance(model, str):
        raise TypeError(f"model must be a transformers model, or the name of one; got {type(model).__name__}")


def check_causal(trainer: str, model: Any) -> None:
    """TRL's collators make batches for causal language models.

    Raises:
        ValueError: an encoder-decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{trainer} trains causal language models; {type(model).__name__} is an encoder-decoder")


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


def check_args(args: Any, needed: type, *, liger: bool = False) -> None:
    """The configuration must be of the trainer's kind, without what would replace the forward.

    Args:
        args: the configuration.
        needed: its class.
        liger: whether TRL's trainer itself leaves Liger's forward out.

    Raises:
        TypeError: another class, or a length that is no integer.
        ValueError: Liger's fused cross-entropy is asked for, or a length below 1.
    """
    if not isinstance(args, needed):
        raise TypeError(f"args must be a {needed.__name__}; got {type(args).__name__}")
    validate.at_least("max_length", args.max_length, 1, optional=True)
    kept_out = liger or (args.liger_kernel_config or {}).get("fused_linear_cross_entropy") is False
    if args.use_liger_kernel and not kept_out:
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


def check_padding_free(model: nn.Module, *, vision: bool, several_rows: bool) -> None:
    """A model must keep the sequences of a row apart, which a small forward shows.

    Raises:
        ValueError: it does not; pictures, a prompt-learning adapter, or an encoder-decoder.
    """
    if vision or virtual_tokens(model):
        raise ValueError("padding_free=True needs rows of text without virtual tokens; leave it out")
    try:
        check_packs(unwrap(model), 2 if several_rows else 1)
    except ValueError as error:
        raise ValueError(f"padding_free=True cannot be used: {error}") from error


def check_tokenizer(processing_class: Any, *, text_only: bool = False) -> None:
    """Batches are padded with the tokenizer's own token, or as TRL does with its EOS token.

    Args:
        processing_class: a tokenizer, a processor, or None (it is loaded with the model).
        text_only: whether a processor is refused.

    Raises:
        TypeError: another object, such as a tokenizer's name.
        ValueError: a tokenizer with neither token.
    """
    if processing_class is None:
        return
    kind = type(processing_class).__name__
    # A tokenizer may have a `tokenizer` too, which is another library's.
    tokenizer: Any = processing_class
    if isinstance(processing_class, ProcessorMixin):
        tokenizer = processing_class.tokenizer  # type: ignore[attr-defined]
    if text_only and tokenizer is not processing_class:
        raise TypeError(
            f"processing_class must be a tokenizer, since this trainer reads text alone; got a {kind}: give its "
            "tokenizer, processing_class.tokenizer"
        )
    if isinstance(processing_class, str):
        raise TypeError(
            f"processing_class must be a tokenizer, not its name; got {processing_class!r}: load it with "
            "transformers.AutoTokenizer.from_pretrained"
        )
    if not hasattr(tokenizer, "pad_token"):
        raise TypeError(f"processing_class must be a tokenizer of transformers; got a {kind}")
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(f"processing_class must have a pad token or an EOS token to pad with; got a {kind} without")


def check_eos(tokenizer: Any) -> None:
    """TRL ends completions with the tokenizer's EOS token.

    Raises:
        ValueError: it has none.
    """
    if tokenizer.eos_token is None:
        raise ValueError(
            "processing_class must have an EOS token, which ends the completions; set its eos_token; got a "
            f"{type(tokenizer).__name__} without"
        )


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
