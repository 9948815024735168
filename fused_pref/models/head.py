"""The output head of transformers models: which layer it is, and what the model does with its logits."""

import math
import numbers
from typing import Any, NamedTuple

from torch import Tensor, nn

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# The meaning of `logits_scaling` by model type; everywhere else (Granite) it divides the logits. MiniCPM3 divides the
# hidden states before the head, which then come scaled.
LOGITS_SCALING = {"hyperclovax": lambda scaling: scaling, "minicpm3": lambda scaling: 1.0}


class OutputHead(NamedTuple):
    """What makes a model's logits: softcap(logit_scale · (hidden · weightᵀ + bias)).

    Attributes:
        backbone: the model without its head (the model itself where it has no such part, as T5).
        module: the head, a linear layer that the model calls; (V, D) weight.
        bias: (V,) of the head and the model (``final_logits_bias`` of the BART family) together, or None.
        softcap: c of c·tanh(x/c), or None.
        logit_scale: factor on the logits.
    """

    backbone: nn.Module
    module: nn.Module
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    @property
    def weight(self) -> Tensor:
        """(V, D)."""
        return self.module.weight  # type: ignore[return-value]


def find_head(model: nn.Module) -> OutputHead:
    """Find the output head of a transformers model, which may be wrapped by PEFT, DDP or accelerate.

    Args:
        model: with ``get_output_embeddings`` and ``config``.

    Returns:
        :class:`OutputHead`, of the model's own tensors.

    Raises:
        ValueError: there is no output head, an adapter sits on it, or its weight is quantised.
        TypeError: not such a model.
    """
    base = unwrap(model)
    head = base.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"model must have output embeddings (a language-model head); {type(base).__name__} has none; "
            "see docs/loop.md"
        )
    module = _active(head)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"the output head of {type(base).__name__} must be a linear layer; got {type(module).__name__}; see "
            "docs/loop.md"
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"the output head of {type(base).__name__} must not be quantised; its weight is {weight.dtype}"
        )
    return OutputHead(base.base_model, module, head_bias(base, module), *logits_transform(base))


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside of wrappers: DDP, ``torch.compile`` and PEFT.

    Raises:
        TypeError: not a transformers model.
        ValueError: ``nn.DataParallel``, whose replicas would share one objective.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError("model must not be an nn.DataParallel; use one process for each GPU (torchrun, accelerate)")
    for name in ("module", "_orig_mod", "_fsdp_wrapped_module"):
        inner = model._modules.get(name) if isinstance(model, nn.Module) else None
        if inner is not None:
            return unwrap(inner)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        raise TypeError(f"model must be a transformers model; got {type(model).__name__}")
    return model


def head_layers(head: nn.Module) -> list[nn.Module]:
    """The linear layers that may be called as the head: those that PEFT's ``modules_to_save`` keeps, or the one."""
    head = head._modules.get("_fsdp_wrapped_module") or head
    saved = head._modules.get("modules_to_save")
    if isinstance(saved, nn.ModuleDict):
        return [module for module in (head._modules.get("original_module"), *saved.values()) if module is not None]
    if type(head).__module__.startswith("peft."):
        raise ValueError(
            f"an adapter on the output head ({type(head).__name__}) is not supported: the head is used through its "
            "weight; leave it out of target_modules (with tied embeddings also out of trainable_token_indices), or "
            "train it whole with modules_to_save; see docs/lora.md"
        )
    return [head]


def _active(head: nn.Module) -> nn.Module:
    """The layer that a call of the head runs now."""
    candidates = head_layers(head)
    if len(candidates) == 1:
        return candidates[0]
    adapters: Any = getattr(head, "active_adapters", ())
    saved: Any = head.modules_to_save
    usable = [name for name in adapters if name in saved] if not getattr(head, "disable_adapters", False) else []
    return saved[usable[0]] if usable else candidates[0]


def head_bias(model: Any, module: nn.Module) -> Tensor | None:
    """(V,) bias of the layer and of the model (``final_logits_bias``), or None."""
    own, final = getattr(module, "bias", None), getattr(model, "final_logits_bias", None)
    if final is None:
        return own
    final = final.flatten().to(module.weight.device)  # type: ignore[union-attr]
    return final if own is None else own + final


def logits_transform(model: Any) -> tuple[float | None, float]:
    """(softcap, logit_scale) of a model, by its configuration."""
    config = model.config.get_text_config(decoder=True)
    return _first_number(config, SOFTCAPS), _logit_scale(config)


def _logit_scale(config: Any) -> float:
    factor = _first_number(config, FACTORS)
    if factor is not None:
        return factor
    scaling = _first_number(config, ("logits_scaling",))
    if scaling is None:
        return 1.0
    return LOGITS_SCALING.get(config.model_type, _inverse)(scaling)


def _inverse(divisor: float) -> float:
    return 1 / divisor if divisor else math.inf


def _first_number(config: Any, names: tuple[str, ...]) -> float | None:
    """The first of the entries that is a number: words and switches under these names mean something else."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            return float(value)
    return None


def sharded(tensor: Tensor) -> bool:
    """Whether a parameter is a DTensor."""
    return hasattr(tensor, "full_tensor")
