"""The output head of transformers models: which layer it is, and what the model does with its logits."""

import logging
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# The meaning of `logits_scaling` by model type; everywhere else (Granite) it divides the logits. MiniCPM3 divides the
# hidden states before the head, which then come scaled.
LOGITS_SCALING = {"hyperclovax": lambda scaling: scaling, "minicpm3": lambda scaling: 1.0}
# Of the largest logit, between a model's own logits and those of the head found in it; rounding is less.
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_TOLERANCE = 0.03


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
        raise ValueError(f"model must have output embeddings (a language-model head); {type(base).__name__} has none")
    module = _active(head)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"the output head of {type(base).__name__} must be a linear layer; got {type(module).__name__}"
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
            "train it whole with modules_to_save"
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
    softcap = next((value for name in SOFTCAPS if (value := getattr(config, name, None)) is not None), None)
    return softcap, _logit_scale(config)


def _logit_scale(config: Any) -> float:
    for name in FACTORS:
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(LOGITS_SCALING.get(config.model_type, lambda divisor: 1 / divisor)(scaling))


def check_logits(model: Any, head: OutputHead) -> None:
    """See on two tokens that the model's logits are those of its head.

    Raises:
        ValueError: they are not.
    """
    parameters = [*model.parameters()]
    if any(parameter.is_meta or parameter.numel() == 0 or sharded(parameter) for parameter in parameters):
        return
    ids = torch.tensor([[0, 1]], device=model.get_input_embeddings().weight.device)
    inputs = {"input_ids": ids, "use_cache": False, "return_dict": True}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    seen: list[Tensor] = []
    modes = {module: module.training for module in model.modules()}
    hook = head.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
    except Exception as error:
        # Two tokens on the spot are not every model's input; the objective itself does not depend on this.
        logger.warning("could not check the output head of %s on two tokens: %s", type(model).__name__, error)
        return
    finally:
        hook.remove()
        for module, training in modes.items():
            module.training = training
    if not seen:
        raise ValueError(f"{type(model).__name__} does not call its output embeddings to make its logits")
    expected = _logits(seen[0], head).to(logits.device)
    worst = (logits.float() - expected).abs().max().item()
    if not worst <= TOLERANCES.get(seen[0].dtype, HALF_TOLERANCE) * expected.abs().max().item() + 1e-6:
        raise ValueError(
            f"the logits of {type(model).__name__} must be softcap(logit_scale · (hidden · weightᵀ + bias)) with "
            f"softcap={head.softcap}, logit_scale={head.logit_scale}; they differ by {worst:.3g}"
        )


def _logits(hidden: Tensor, head: OutputHead) -> Tensor:
    logits = F.linear(hidden, head.weight).float()
    logits = head.logit_scale * (logits if head.bias is None else logits + head.bias.float())
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def sharded(tensor: Tensor) -> bool:
    """Whether a parameter is a DTensor."""
    return hasattr(tensor, "full_tensor")
