"""The linear head inside transformers models: find it, and run an objective there in place of the logits.

:func:`attach` gives a model's forward one more keyword, ``preference``. A forward with it is the model's own up to the
output head, whose input then goes to the objective instead of into a product with the whole vocabulary. Whatever the
model or its wrappers do on the way (autocast, device maps, sharding, adapters, scaled hidden states, router losses) is
done as ever. A forward without it, as in generation, is unchanged.
"""

import contextlib
import difflib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fused_pref import validate
from fused_pref.models.head import (
    OutputHead,
    find_head,
    head_bias,
    head_layers,
    logits_transform,
    sharded,
    unwrap,
)
from fused_pref.models.inputs import with_decoder_inputs, with_positions, without_padding
from fused_pref.models.probe import check_logits
from fused_pref.modules import ObjectiveModule

__all__ = ["OutputHead", "Preference", "attach", "find_head", "preference_forward", "unwrap", "virtual_tokens"]

LOSS = "a linear loss, whose parameters are named hidden, weight, labels, ..."
# What a loss is given by the model.
HEAD = ("hidden", "weight", "bias")


class Preference:
    """What one forward computes at the head in place of logits.

    Args:
        loss: ``LinearCPOLoss`` or another of the linear modules, or a function of
            (hidden, weight, labels, ..., *, bias, softcap, logit_scale), such as :func:`fused_pref.linear_cpo_loss`.
        tensors: what the loss takes after hidden and weight, labels first.
        keywords: what it takes by name.
        virtual_tokens: positions that a prompt-learning adapter may put before those of the labels.
        padding_free: whether the model gets a padded batch without padding; all tensors but those of one entry a
            sequence are then (S, T).
        row_tokens: the most tokens of a row without padding; None: one row.
        token_index: (N_total,) int64, the place of each packed token among the model's (R, L); None: in their order.
    """

    # A plain class: wrappers copy dataclasses and tuples among a forward's arguments, and the output would be lost.
    def __init__(
        self,
        loss: Callable[..., Any],
        tensors: tuple[Tensor, ...],
        keywords: Mapping[str, Any],
        virtual_tokens: int = 0,
        *,
        padding_free: bool = False,
        row_tokens: int | None = None,
        token_index: Tensor | None = None,
    ) -> None:
        if not callable(loss):
            raise validate.fail("loss", LOSS, loss, TypeError)
        if not isinstance(tensors, tuple | list) or not tensors:
            raise validate.fail("tensors", "a tuple of tensors, labels first", tensors, TypeError)
        for number, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise validate.fail(f"tensors[{number}]", "a tensor", tensor, TypeError)
        if not isinstance(keywords, Mapping):
            raise validate.fail("keywords", "a mapping of what the loss takes by name", keywords, TypeError)
        self.loss = loss.call if isinstance(loss, ObjectiveModule) else loss
        # What the loss was made with: a module, or a function with some keywords fixed.
        own = getattr(loss, "keywords", None)
        self.own: Mapping[str, Any] = own if isinstance(own, Mapping) else {}
        self.tensors = tensors
        self.keywords = dict(keywords)
        self.virtual_tokens = validate.at_least("virtual_tokens", virtual_tokens, 0)
        self.padding_free = validate.flag("padding_free", padding_free)
        self.row_tokens = validate.at_least("row_tokens", row_tokens, 1, optional=True)
        self.token_index = token_index
        self.output: Any = None

    def __call__(self, hidden: Tensor, head: OutputHead) -> Tensor:
        """The differentiable part of the loss's output, which is kept whole in ``output``."""
        self.check_own(head)
        labels, *others = (tensor.to(hidden.device) for tensor in self.tensors)
        keywords = {name: _to(value, hidden.device) for name, value in self.keywords.items()}
        if keywords.get("cu_seqlens") is not None:
            hidden, labels = hidden.flatten(0, -2), labels.flatten()
            if self.token_index is not None:
                hidden = hidden.index_select(0, self.token_index.to(hidden.device))
        elif labels.dim() > 1 and hidden.shape[1] == labels.shape[1] + self.virtual_tokens:
            hidden = hidden[:, self.virtual_tokens :]
        self.output = self.loss(
            hidden,
            _whole(head.weight),
            labels,
            *others,
            bias=None if head.bias is None else _whole(head.bias).to(head.weight.dtype),
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            **keywords,
        )
        return self.output if isinstance(self.output, Tensor) else self.output.loss

    def check_own(self, head: OutputHead) -> None:
        """Refuse a loss with another bias, softcap or logit scale than the model's."""
        found = {"bias": head.bias, "softcap": head.softcap, "logit_scale": head.logit_scale}
        for name, unset in (("bias", None), ("softcap", None), ("logit_scale", 1.0)):
            value = self.own.get(name, unset)
            if value != unset and (name == "bias" or value != found[name]):
                model = validate.describe(found[name])
                raise validate.fail(name, f"left to the model, whose own is {model}", value)

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, Tensor | None]:
        """Forward of an attached model: the loss's output, and the model's router loss where it gives one."""
        if self.padding_free:
            labels, *others = self.tensors
            padded = {"labels": labels, "token_weight": self.keywords.get("token_weight")}
            inputs, cu_seqlens, index, parts = without_padding(unwrap(model), inputs, padded, self.row_tokens)
            keywords = {**self.keywords, **parts, "cu_seqlens": cu_seqlens}
            tensors = (keywords.pop("labels"), *others)
            return Preference(self.loss, tensors, keywords, token_index=index).run(model, inputs)
        scored = model(**inputs, preference=self)
        output, self.output = self.output, None
        if output is None:
            raise RuntimeError(
                f"the forward of {type(model).__name__} is not the one that attach() gave it: something has put the "
                "old one back (pickling, unwrapping, removed hooks); call attach() again"
            )
        # The loss as it came through the forwards of the wrappers, which may have hooked or converted it.
        loss = scored["loss"]
        return (loss if isinstance(output, Tensor) else output._replace(loss=loss)), scored["aux_loss"]


def attach(model: nn.Module) -> Any:
    """Give a model's forward the keyword ``preference``; does nothing the second time.

    Attach before the model is sharded or wrapped for several devices. Unless its weight is sharded already, the head
    is tried on made-up hidden states, to see that the model makes its logits by it; no layer is run.

    Args:
        model: a transformers model, also inside of PEFT.

    Returns:
        The transformers model.

    Raises:
        ValueError, TypeError: as :func:`find_head`; Liger's forward is in place; the logits are made otherwise.
    """
    base = unwrap(model)
    head = find_head(base)
    if _attached(base):
        return base
    source = inspect.unwrap(getattr(base.forward, "__func__", base.forward))
    if getattr(source, "__module__", "").startswith("liger_kernel"):
        raise ValueError(
            f"the forward of {type(base).__name__} is Liger's fused cross-entropy, which fused_pref replaces; apply "
            "Liger with fused_linear_cross_entropy=False"
        )
    check_logits(base, head)

    # The signature stays that of the class: `generate` and `Trainer` read it.
    @functools.wraps(type(base).forward)
    def forward(self: Any, *args: Any, preference: Preference | None = None, **kwargs: Any) -> Any:
        if preference is PING:
            return PING
        if preference is None:
            return self._plain_forward(*args, **kwargs)
        return _score(self, preference, args, kwargs)

    # Both are bound methods in the model's own dictionary, so that a deep copy of the model runs its own.
    base._plain_forward = base.forward
    base.forward = types.MethodType(forward, base)
    return base


def preference_forward(model: nn.Module, batch: Mapping[str, Any], loss: Callable[..., Any]) -> Any:
    """Loss of a batch under a transformers model, without its logits.

    Args:
        model: a transformers model, plain or wrapped (PEFT, DDP, FSDP, ``torch.compile``). The first call attaches the
            head, so :func:`attach` the model yourself before you wrap it for several devices.
        batch: ``labels`` (S, T) int64, -100 where not scored, and whatever else the loss takes by name (``ref_logps``,
            ``desirable``, ``sample_weight``, ``cu_seqlens``, ...); everything else goes to the model: ``input_ids``
            (S, T), ``attention_mask``, ... A ``LinearPreferenceLoss`` takes the tensors of its objective, by the names
            of its parameters; one with a default may be missing. Pairs come as chosen sequences first, then rejected.
            With ``cu_seqlens``, ``input_ids`` is (1, N_total), ``position_ids`` are made where they are missing, and
            there is no mask but one of ones or of 4 dimensions; with ``token_index`` beside it, as
            :class:`PackingCollator` makes it, it is (R, L). An encoder-decoder model takes the prompts as
            ``input_ids``; its ``decoder_input_ids`` are made from the labels where they are missing, and the labels
            are not shifted.
        loss: a linear module such as ``fp.LinearCPOLoss(beta=0.1)``, or a linear function, such as
            ``functools.partial(fp.linear_cpo_loss, beta=0.1)``. Softcap, logit scale and bias are the model's, and a
            loss that was made with others is refused.

    Returns:
        What the loss returns; where the model asks for a router loss (``output_router_logits``), its share is part of
        ``loss``, as in the model's own forward.

    Raises:
        ValueError, TypeError: as :func:`attach` and the loss; an entry that the loss needs is missing; a model that
            lets packed sequences see each other, or whose decoder inputs cannot be made.
    """
    base = attach(model)
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a mapping with labels and the model's inputs; got {type(batch).__name__}")
    if isinstance(loss, type) and issubclass(loss, ObjectiveModule):
        raise validate.fail("loss", f"an object, made by {loss.__name__}(...), not its class", loss, TypeError)
    try:
        parameters = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters
    except (TypeError, ValueError):  # no function, or a builtin
        parameters = {}
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = {name: parameter for name, parameter in parameters.items() if parameter.kind not in variable}
    if list(parameters)[:2] != ["hidden", "weight"]:
        raise validate.fail("loss", LOSS, loss, TypeError)
    if "objective" in parameters:
        raise validate.fail(
            "loss", "fp.LinearPreferenceLoss(objective), whose tensors a batch can name", loss, TypeError
        )
    required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty][2:]
    own = loss.names_in(batch) if isinstance(loss, ObjectiveModule) else ()
    keywords = {name: batch[name] for name in parameters if name in batch and name not in (*required, *HEAD)}
    # What an objective of one's own calls its tensors may be an input of the model, or a keyword of the loss, too.
    inputs_too = inspect.signature(base.forward).parameters
    taken = {*parameters, "token_index", *(name for name in own if name not in inputs_too)}
    unknown = [name for name in batch if name not in taken and name not in inputs_too]
    refuse_misspelt(unknown, {*parameters, *own} - {*HEAD, *batch})
    required += own
    missing = [name for name in required if name not in batch]
    if missing:
        got = ", ".join(map(str, batch)) or "nothing"
        raise ValueError(f"batch must have {', '.join(missing)}, which the loss takes; got {got}")
    for name in required:
        if not isinstance(batch[name], Tensor):
            raise validate.fail(f"batch[{name!r}]", "a tensor", batch[name], TypeError)
    inputs = {name: value for name, value in batch.items() if name not in taken}
    if keywords.get("cu_seqlens") is not None:
        if virtual_tokens(model):
            raise ValueError("cu_seqlens cannot be used with prompt learning, whose tokens come before the packed ones")
        inputs = with_positions(base, inputs, batch["labels"], keywords["cu_seqlens"], batch.get("token_index"))
    elif "token_index" in batch:
        raise ValueError(f"token_index needs cu_seqlens; got {', '.join(map(str, batch))}")
    elif base.config.is_encoder_decoder:
        keywords["shift"] = False
        inputs = with_decoder_inputs(base, inputs, batch["labels"])
    tensors = tuple(batch[name] for name in required)
    index = batch.get("token_index")
    output, aux_loss = Preference(loss, tensors, keywords, virtual_tokens(model), token_index=index).run(model, inputs)
    if aux_loss is None or isinstance(output, Tensor):
        return output
    router_loss = getattr(base.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
    return output._replace(loss=output.loss + router_loss.to(output.loss.device))


def refuse_misspelt(unknown: list[Any], missing: set[str]) -> None:
    """Refuse an entry that is almost one that the loss takes and a batch lacks: a model may take it, and ignore it."""
    for name in unknown:
        close = difflib.get_close_matches(str(name), sorted(missing), 1, 0.85)
        if close:
            raise ValueError(f"batch has {name}, which neither the loss nor the model takes: is it {close[0]}?")


# A preference that an attached forward gives back, and no other does.
PING: Any = object()


def _attached(model: Any) -> bool:
    """Whether the model's forward leads to the one of :func:`attach`, through whatever wraps it."""
    if "_plain_forward" not in vars(model):
        return False
    try:
        return model.forward(preference=PING) is PING
    except Exception:  # the plain forward, which has no input
        return False


def virtual_tokens(model: nn.Module) -> int:
    """Positions that the active prompt-learning adapter of a PEFT model may put before the input; else 0."""
    config = getattr(getattr(model, "module", model), "active_peft_config", None)
    return config.num_virtual_tokens if getattr(config, "is_prompt_learning", False) else 0  # type: ignore[union-attr]


def _score(model: Any, preference: Preference, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The model's own forward with the preference at the head; a dictionary of tensors, as wrappers can handle."""
    losses: list[Tensor] = []
    transform = logits_transform(model)

    def score(module: nn.Module, hidden: Tensor) -> Tensor:
        weight: Any = module.weight
        losses.append(preference(hidden, OutputHead(model.base_model, module, head_bias(model, module), *transform)))
        return hidden.new_empty(0, *hidden.shape[1:-1], weight.shape[0])

    # PEFT's prefixes come by the name that newer models have replaced.
    if "past_key_values" in kwargs and "cache" in inspect.signature(model._plain_forward).parameters:
        kwargs["cache"] = kwargs.pop("past_key_values")
    with _replaced_forward(head_layers(model.get_output_embeddings()), score):
        outputs = model._plain_forward(*args, **{**kwargs, "use_cache": False, "return_dict": True})
    if len(losses) != 1:
        raise RuntimeError(f"{type(model).__name__} called its output head {len(losses)} times in a forward, not once")
    return {"loss": losses[0], "aux_loss": getattr(outputs, "aux_loss", None)}


@contextlib.contextmanager
def _replaced_forward(modules: list[nn.Module], forward: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
    """Let a forward of any of the modules, below their hooks, be ``forward`` of the module and its input."""
    # accelerate's hooks call what the forward was before them, under this name.
    attributes = [(module, "_old_forward" if "_old_forward" in vars(module) else "forward") for module in modules]
    saved = [vars(module).get(name) for module, name in attributes]
    try:
        for module, name in attributes:
            vars(module)[name] = functools.partial(forward, module)
        yield
    finally:
        for (module, name), before in zip(attributes, saved, strict=True):
            if before is None:
                del vars(module)[name]
            else:
                vars(module)[name] = before


def _whole(tensor: Tensor) -> Tensor:
    """A parameter that FSDP2 left sharded, gathered; differentiable."""
    return tensor.full_tensor() if sharded(tensor) else tensor  # type: ignore[operator]


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
