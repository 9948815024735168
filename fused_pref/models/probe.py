"""What a transformers model does, seen on a few tokens; the model is left as it was."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_pref.models.head import OutputHead, sharded
from fused_pref.models.packing import boundaries_of, flash_attn_kwargs, is_flash_attention

logger = logging.getLogger(__name__)

# Of the largest logit, between a model's own logits and those of the head found in it; rounding is less.
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_TOLERANCE = 0.03
# The largest logit of a probe without softcap: one that the configuration does not name then shows.
LARGEST_LOGIT = 30.0
# Hidden states beyond it would not be finite in float16.
LARGEST_HIDDEN = 1e4
# Tokens of the two sequences of a packed probe.
LENGTHS = (3, 4)


def check_logits(model: Any, head: OutputHead) -> None:
    """See that the model's logits are those of its head; only what stands around the layers is run.

    The layers give made-up hidden states of two tokens in place of their own. So no weight but the head's is read, and
    no state of a layer changes. Nothing is checked where the head's weight is sharded or elsewhere (meta).

    Raises:
        ValueError: the logits are not those of the head.
    """
    name, weight = type(model).__name__, head.weight
    if isinstance(head.module, nn.Embedding):
        raise ValueError(
            f"the output embeddings of {name} must be a layer that is called with hidden states; got an Embedding, "
            "which is called with token ids"
        )
    if sharded(weight) or weight.is_meta or weight.dim() != 2 or weight.numel() == 0:
        return
    products: list[Any] = []
    reason: Exception | None = None

    def multiply(module: nn.Module, args: tuple[Any, ...]) -> None:
        # Within the forward, so that autocast is as it is there.
        fits = args[0].is_floating_point() and args[0].shape[-1] == weight.shape[1]
        products.append(F.linear(args[0].to(weight.device), weight, getattr(module, "bias", None)) if fits else None)

    with _untouched([model], weight.device), torch.no_grad():
        hook = head.module.register_forward_pre_hook(multiply)
        try:
            logits = _logits_without_layers(model, head)
        except Exception as error:
            # The objective itself does not depend on what this could not run.
            logits, reason = None, error
        finally:
            hook.remove()
    if any(product is None for product in products):
        raise ValueError(f"the output embeddings of {name} must be called with hidden states (..., {weight.shape[1]})")
    if logits is None:
        logger.warning("could not check the output head of %s: %s", name, reason)
    elif not products:
        raise ValueError(f"{name} does not call its output embeddings to make its logits")
    else:
        _compare(name, logits, products[-1], head)


def _compare(name: str, logits: Tensor, product: Tensor, head: OutputHead) -> None:
    """The logits of a model, and those that the head makes of its product."""
    # The layer's own bias is in the product.
    own, expected = getattr(head.module, "bias", None), product.float()
    if head.bias is not None and head.bias is not own:
        expected = expected + (head.bias if own is None else head.bias - own).float()
    expected = (head.logit_scale * expected).to(logits.device)
    if head.softcap is not None:
        expected = head.softcap * torch.tanh(expected / head.softcap)
    if logits.shape != expected.shape:
        raise ValueError(f"the logits of {name} must be {tuple(expected.shape)} like its head's; got {logits.shape}")
    # As exact as the coarser of the two: autocast rounds the product, wrappers convert the logits.
    tolerance = max(TOLERANCES.get(tensor.dtype, HALF_TOLERANCE) for tensor in (product, logits))
    worst = (logits.float() - expected).abs().max().item()
    if not worst <= tolerance * expected.abs().max().item() + 1e-6:
        raise ValueError(
            f"the logits of {name} must be softcap(logit_scale · (hidden · weightᵀ + bias)) with "
            f"softcap={head.softcap}, logit_scale={head.logit_scale}; they differ by {worst:.3g}"
        )


def _logits_without_layers(model: Any, head: OutputHead) -> Tensor:
    """(1, 2, V) logits of the model's forward on made-up hidden states.

    Raises:
        Exception: what the forward raises; there is nothing to leave out.
    """
    layers = list(_layers(model, model.base_model, head.module))
    if not layers:
        raise RuntimeError("it has no part that could be left out of a forward")
    ids = torch.tensor([[0, 1]], device=head.weight.device)
    inputs = {"input_ids": ids, "use_cache": False, "return_dict": True}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    output = _Output((_hidden(head),))
    try:
        for parent, name, module in layers:
            parent._modules[name] = _LeftOut(module, output)
        # Not a call of the model: its hooks, and a compiler, have no part in this.
        return model.forward(**inputs).logits
    finally:
        for parent, name, module in layers:
            parent._modules[name] = module


def _layers(parent: nn.Module, backbone: nn.Module, head: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The models inside of a model that lead up to its head, as (parent, name, module)."""
    for name, module in parent._modules.items():
        if module is None:
            continue
        if any(part is head for part in module.modules()):
            yield from _layers(module, backbone, head)
        elif module is backbone or (hasattr(module, "config") and hasattr(module, "get_input_embeddings")):
            yield parent, name, module


def _hidden(head: OutputHead) -> Tensor:
    """(1, 2, D) hidden states whose logits are large enough to show a softcap."""
    weight = head.weight
    hidden = torch.arange(2.0 * weight.shape[1], device=weight.device).mul_(1.6).sin_().view(1, 2, -1)
    largest = F.linear(hidden.to(weight.dtype), weight).abs().max().item() * abs(head.logit_scale)
    factor = (LARGEST_LOGIT if head.softcap is None else abs(head.softcap)) / largest if largest else 1.0
    return hidden.mul_(min(factor, LARGEST_HIDDEN)).to(weight.dtype)


class _Output(tuple[Tensor]):
    """What layers return: hidden states, under the names that a forward asks for, and nothing else."""

    def __getattr__(self, name: str) -> Tensor | None:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


class _LeftOut(nn.Module):
    """Stands for layers: returns ``output``, and has their attributes."""

    def __init__(self, layers: nn.Module, output: _Output) -> None:
        super().__init__()
        # Not registered: whoever walks through the modules does not find the layers.
        self.__dict__.update(layers=layers, output=output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layers"], name)

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        """The output, whatever the input."""
        return self.output


def check_packing(model: Any, rows: int = 1) -> None:
    """See that the model keeps packed sequences apart, if its weights are whole; a small forward in evaluation mode.

    Raises:
        ValueError: it does not.
    """
    name = type(model).__name__
    parameters = list(model.parameters())
    if any(parameter.is_meta or parameter.numel() == 0 or sharded(parameter) for parameter in parameters):
        return
    with _untouched(list(model.modules()), model.get_output_embeddings().weight.device), torch.enable_grad():
        try:
            crosses, shifted = _packing(model.eval(), rows)
        except Exception as error:
            logger.warning("could not check that %s keeps packed sequences apart: %s", name, error)
            return
    if crosses or shifted:
        fault = "lets a sequence see those before it" if crosses else "counts positions from another start than 0"
        raise ValueError(
            f"cu_seqlens needs a model that keeps packed sequences apart: {name} {fault}; pad instead "
            "(see docs/packed.md)"
        )


def _packing(model: Any, rows: int) -> tuple[bool, bool]:
    """Whether the second of two packed sequences depends on the first, and whether positions from 0 are not its own.

    They lie in a row, and there are some rows of the same tokens.
    """
    first, second = LENGTHS
    embeddings, seen = model.get_input_embeddings(), []
    device = embeddings.weight.device
    ids = torch.arange(first + second, device=device).expand(rows, -1) % embeddings.weight.shape[0]
    positions = torch.cat([torch.arange(length, device=device) for length in LENGTHS]).expand(rows, -1)
    boundaries = boundaries_of(torch.tensor(LENGTHS * rows, device=device))
    given = flash_attn_kwargs(boundaries, max(LENGTHS)) if is_flash_attention(model) else {}

    def run(**inputs: Any) -> Tensor:
        return model.forward(**inputs, use_cache=False, return_dict=True).logits

    def start(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1].clone()  # models scale it in place

    with contextlib.ExitStack() as stack:
        stack.callback(embeddings.register_forward_hook(start).remove)
        logits = run(input_ids=ids, position_ids=positions, **given)[:, first:].float()
    # Exactly 0 where attention is masked, in any dtype.
    weights = torch.arange(float(logits.numel()), device=logits.device).sin_().view(logits.shape)
    (slope,) = torch.autograd.grad((logits * weights).sum(), seen[:1])
    with torch.no_grad():
        alone = run(input_ids=ids[:, first:], position_ids=positions[:, first:])
        default = run(input_ids=ids[:, first:])
    worst = (alone - default).abs().max()
    return bool((slope[:, :first] != 0).any()), bool(worst > TOLERANCES[torch.float32] * default.abs().max())


@contextlib.contextmanager
def _untouched(modules: list[Any], device: torch.device) -> Iterator[None]:
    """Afterwards the attributes of the modules are those of before, and so is the random state."""
    saved = [(part, dict(part)) for module in modules for part in (vars(module), module._buffers)]
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    with torch.random.fork_rng(devices, device_type=kind):
        try:
            yield
        finally:
            for part, before in saved:
                part.clear()
                part.update(before)
