"""Triton's interpreter, made quicker for tests: it works out again and again what never changes.

Every helper that a program calls remaps the whole language, every value works out the attributes of its type, and every
operation casts and broadcasts operands that are alike. Here the language is remapped once a launch and module, types
keep what was found, and operands that are alike stay as they are. Results are the same.
"""

from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken() -> None:
    """To be called once, before kernels run."""
    remap_once()
    keep_types()
    leave_alike()


def remap_once() -> None:
    """Remap the language once a launch and module."""
    executor: Any = interpreter.GridExecutor
    patch, launch, done = interpreter._patch_lang, executor.__call__, set[int]()

    def patch_of(function: Any) -> Any:
        module = id(function.__globals__)
        if module in done:
            return None
        done.add(module)
        return patch(function)

    def launch_of(self: Any, *args: Any, **keywords: Any) -> Any:
        done.clear()
        return launch(self, *args, **keywords)

    interpreter._patch_lang, executor.__call__ = patch_of, launch_of


def keep_types() -> None:
    """Let equal types of blocks share their attributes, and keep with a type what its values have of it."""
    block: Any = tl.block_type
    tensor: Any = tl.tensor
    make_block, make_tensor, find_dtype = block.__init__, tensor.__init__, interpreter._get_np_dtype
    blocks: dict[Any, dict[str, Any]] = {}

    def block_of(self: Any, element_ty: Any, shape: Any) -> None:
        lengths = tuple([length.value if isinstance(length, tl.constexpr) else length for length in shape])
        pointer = getattr(element_ty, "address_space", None), getattr(element_ty, "const", None)
        key = type(element_ty), element_ty.name, pointer, lengths
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = {**vars(self), "lengths": lengths}
        self.__dict__ = blocks[key]

    def tensor_of(self: Any, handle: Any, type: Any) -> None:
        kept = vars(type).get("of_tensor")
        if kept is None:
            make_tensor(self, handle, type)
            vars(type)["of_tensor"] = kept = {name: value for name, value in vars(self).items() if name != "handle"}
        self.__dict__.update(kept, handle=handle)

    def dtype_of(type: Any) -> Any:
        kept = vars(type)
        if "np_dtype" not in kept:
            kept["np_dtype"] = find_dtype(type)
        return kept["np_dtype"]

    block.__init__, tensor.__init__, interpreter._get_np_dtype = block_of, tensor_of, dtype_of


def leave_alike() -> None:
    """Neither cast a value to its own type nor broadcast blocks of one shape."""
    semantic: Any = TritonSemantic
    cast, broadcast = semantic.cast, semantic.broadcast_impl_value

    def cast_of(self: Any, input: Any, dst_ty: Any, *rounding: Any, **keywords: Any) -> Any:
        if input.dtype is dst_ty:
            return input
        return cast(self, input, dst_ty, *rounding, **keywords)

    def broadcast_of(self: Any, lhs: Any, rhs: Any) -> Any:
        if vars(lhs.type).get("lengths") == vars(rhs.type).get("lengths"):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.cast, semantic.broadcast_impl_value = cast_of, broadcast_of
