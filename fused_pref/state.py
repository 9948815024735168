"""Modules whose saved state must stay exact."""

from typing import Any

from torch import nn
from typing_extensions import Self


class ExactModule(nn.Module):
    """A module whose buffers move with the model but keep their dtypes, under ``.bfloat16()`` for one."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self
