"""A gradient times its upstream gradient, which the host does not know: where that is 1, nothing is touched."""

import triton
import triton.language as tl
from torch import Tensor

from fused_pref.ops.triton import configs
from fused_pref.ops.triton.launch import launch


@triton.jit
def _scale_kernel(
    gradient,  # [n], updated
    upstream,  # 0-d
    number,
    BLOCK: tl.constexpr,
):
    factor = tl.load(upstream).to(tl.float32)
    if factor != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(gradient + place, mask=place < number, other=0.0).to(tl.float32)
        tl.store(gradient + place, (x * factor).to(gradient.dtype.element_ty), mask=place < number)


def scale_(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Multiply a contiguous tensor in place by a 0-d one, in float32 and rounded once. One launch."""
    number = gradient.numel()
    if number:
        config = configs.choose(configs.BACKWARD, gradient.device, gradient.dtype, number)
        launch(
            _scale_kernel, (triton.cdiv(number, config.block),), gradient.device,
            gradient, upstream, number, BLOCK=config.block, **config.options,
        )  # fmt: skip
    return gradient
