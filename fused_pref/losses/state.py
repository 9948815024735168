"""Modules whose saved state must stay exact."""

from typing import Any

from torch import nn
from typing_extensions import Self


class ExactModule(nn.Module):
    """A module whose buffers keep their dtypes, however the model is cast and whatever is loaded."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Undo what ``assign=True`` does to a dtype."""
        dtypes = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        super()._load_from_state_dict(*args)
        for name, dtype in dtypes.items():
            loaded = self._buffers[name]
            self._buffers[name] = None if loaded is None else loaded.to(dtype)
