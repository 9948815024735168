"""Gradients times their upstream gradient, which the host does not know: where that is 1, nothing is touched."""

import triton
import triton.language as tl
from torch import Tensor

from fused_pref.ops.triton import configs
from fused_pref.ops.triton.launch import cdiv, launch


@triton.jit
def _scale_block(gradient, number, block, factor, BLOCK: tl.constexpr):
    """Scale a block of a tensor, if it is one of its blocks; the number of that block among those of other tensors."""
    if gradient is not None:
        number = tl.cast(number, tl.int64)
        if (block >= 0) & (block * BLOCK < number):
            place = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(gradient + place, mask=place < number, other=0.0).to(tl.float32)
            tl.store(gradient + place, (x * factor).to(gradient.dtype.element_ty), mask=place < number)
        block -= tl.cdiv(number, BLOCK)
    return block


@triton.jit
def _scale_kernel(
    first, second, third,  # [n] of each, updated; the last ones may be None
    upstream,  # 0-d
    first_number, second_number, third_number,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The blocks of one tensor, then those of the next."""
    factor = tl.load(upstream).to(tl.float32)
    if factor != 1.0:
        block = tl.program_id(0).to(tl.int64)
        block = _scale_block(first, first_number, block, factor, BLOCK)
        block = _scale_block(second, second_number, block, factor, BLOCK)
        _scale_block(third, third_number, block, factor, BLOCK)


def scale_(gradients: list[Tensor], upstream: Tensor) -> None:
    """Multiply up to three contiguous tensors in place by a 0-d one, in float32 and rounded once. One launch."""
    numbers = [gradient.numel() for gradient in gradients]
    longest = max(gradients, key=Tensor.numel)
    config = configs.choose(configs.defaults(longest.device).backward, longest.device, longest.dtype, longest.numel())
    blocks = sum(cdiv(number, config.block) for number in numbers)
    if blocks:
        missing = 3 - len(gradients)
        launch(
            _scale_kernel, (blocks,), longest.device,
            *gradients, *[None] * missing, upstream, *numbers, *[0] * missing, BLOCK=config.block, **config.options,
        )  # fmt: skip
