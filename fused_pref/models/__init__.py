"""The linear head inside transformers models: :func:`attach`, :func:`preference_forward`, :class:`PackingCollator`."""

from fused_pref.models.head import OutputHead, find_head, unwrap
from fused_pref.models.packing import PackingCollator
from fused_pref.models.preference import Preference, attach, preference_forward, virtual_tokens

__all__ = [
    "OutputHead",
    "PackingCollator",
    "Preference",
    "attach",
    "find_head",
    "preference_forward",
    "unwrap",
    "virtual_tokens",
]
