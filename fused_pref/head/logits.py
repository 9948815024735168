"""Token log-probs of materialised logits as a differentiable function."""

from typing import Any

import torch
from torch import Tensor

from fused_pref.head.logits_ops import token_logps_bwd, token_logps_bwd_, token_logps_fwd
from fused_pref.head.spec import LogitsSpec


class TokenLogpsFunction(torch.autograd.Function):
    """(logits, labels, cu_seqlens) → (logp, mean of z), per position; the gradient is a_n (onehot − softmax)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, spec: LogitsSpec
    ) -> tuple[Tensor, Tensor]:
        """See :func:`fused_pref.head.logits_ops.token_logps_fwd`."""
        logp, statistics, means = token_logps_fwd(logits, labels, cu_seqlens, spec.logits_mean, *spec.constants)
        ctx.save_for_backward(logits, labels, cu_seqlens, statistics)
        ctx.spec, ctx.overwritten = spec, False
        ctx.mark_non_differentiable(means)
        if not torch.compiler.is_compiling():
            # Else zeros would be filled in as the gradient of the means. Dynamo lacks this, and drops them itself.
            ctx.set_materialize_grads(False)
        return logp, means

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        """See :func:`fused_pref.head.logits_ops.token_logps_bwd`."""
        spec: LogitsSpec = ctx.spec
        if grads[0] is None:
            return None, None, None, None
        if ctx.overwritten:
            raise RuntimeError("inplace_backward=True: the logits were overwritten by their gradient; backward once")
        logits, *batch = ctx.saved_tensors
        if spec.inplace_backward and not torch.compiler.is_compiling():
            ctx.overwritten = True
            dlogits = logits.detach()
            with torch.no_grad():
                token_logps_bwd_(dlogits, *batch, grads[0], *spec.constants)
        else:
            with torch.no_grad():
                dlogits = token_logps_bwd(logits, *batch, grads[0], *spec.constants)
        if torch.is_grad_enabled():
            dlogits = OnceDifferentiableFunction.apply(dlogits, logits)
        return dlogits, None, None, None


class OnceDifferentiableFunction(torch.autograd.Function):
    """Identity on a gradient made under ``create_graph=True``, tied to what it depends on so that using it raises.

    ``once_differentiable`` would leave it detached, and a gradient penalty would silently have no effect.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, source: Tensor) -> Tensor:
        """``gradient``, as a function of ``source``."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Refuse."""
        raise RuntimeError("fused_pref losses can be differentiated once: there is no second derivative")
