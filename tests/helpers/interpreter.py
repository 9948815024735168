"""Triton's interpreter, made quicker for tests: it works out again and again what never changes.

Every helper that a program calls remaps the whole language, and every value works out the attributes of its type. Here
the language is remapped once a launch and module, and types keep what was found. Results are the same.
"""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """To be called once, before kernels run."""
    remap_once()
    keep_types()


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
            blocks[key] = vars(self)
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
