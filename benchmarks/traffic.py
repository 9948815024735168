"""The bytes that a step moves, as PyTorch's dispatcher sees them."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_pref.head import autograd

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Of their largest operand they touch as many entries as their index has.
SPARSE = {"gather", "scatter_add_", "scatter_add", "index_select", "embedding"}


def computes(function: Any) -> bool:
    """Whether a PyTorch operation touches memory: it is neither a view nor an allocation."""
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
    return not views and function._schema.name.split("::")[1] not in ALLOCATIONS


class Traffic(TorchDispatchMode):
    """Bytes of the operands of every operation that PyTorch dispatches, results included, each counted once.

    A function of :meth:`whole` counts as one: what it keeps in registers or cache is not traffic. Kernels that are
    launched outside of it are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nbytes, self.within = 0, False

    def whole(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which counts as one operation."""

        def call(*arguments: Any) -> Any:
            self.within = True
            result = function(*arguments)
            self.within = False
            self.nbytes += sum(occupied(x) for x in tree_leaves((arguments, result)) if isinstance(x, Tensor))
            return result

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if computes(func) and not self.within:
            name = func._schema.name.split("::")[1]
            read = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
            written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            if name in SPARSE:
                index = args[2] if len(args) > 2 else args[1]
                self.nbytes += sum(min(occupied(x), index.numel() * x.element_size()) for x in (*read, *written))
            else:
                # A tensor is overwritten without being read by these.
                fills = name.endswith("_like") or name in ("copy_", "fill_", "zero_", "zeros", "ones", "new_zeros")
                self.nbytes += sum(map(occupied, read[1:] if fills else read)) + sum(map(occupied, written))
        return result


def occupied(tensor: Tensor) -> int:
    """Bytes of the distinct entries of a tensor that may be expanded."""
    counts = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return functools.reduce(lambda total, size: total * size, counts, tensor.element_size())


def traffic(step: Callable[[], Any]) -> int:
    """Bytes that one call moves; see :class:`Traffic`. Our passes over logits are one operation each."""
    with Traffic() as counted, contextlib.ExitStack() as stack:
        for name in ("token_logps_fwd", "token_logps_bwd"):
            stack.enter_context(mock.patch.object(autograd, name, counted.whole(getattr(autograd, name))))
        step()
    return counted.nbytes
