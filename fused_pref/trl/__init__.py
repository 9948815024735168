"""Trainers for TRL 1.15 or newer that never make logits: drop-ins for DPO, KTO and CPO, and a
``BCOTrainer``.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fused_pref.trl.bco import BCOTrainer
    from fused_pref.trl.bco_config import BCOConfig
    from fused_pref.trl.cpo import CPOTrainer
    from fused_pref.trl.cpo_config import CPOConfig
    from fused_pref.trl.dpo import DPOTrainer
    from fused_pref.trl.dpo_config import DPOConfig
    from fused_pref.trl.kto import KTOTrainer
    from fused_pref.trl.kto_config import KTOConfig

OLDEST = (1, 15)
HOMES = {
    "BCOConfig": "bco_config",
    "BCOTrainer": "bco",
    "CPOConfig": "cpo_config",
    "CPOTrainer": "cpo",
    "DPOConfig": "dpo_config",
    "DPOTrainer": "dpo",
    "KTOConfig": "kto_config",
    "KTOTrainer": "kto",
}

__all__ = [
    "BCOConfig",
    "BCOTrainer",
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "KTOConfig",
    "KTOTrainer",
]


def _require_trl() -> None:
    needed = ".".join(map(str, OLDEST))
    try:
        installed = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f'fused_pref.trl needs TRL {needed} or newer: pip install "fused-pref[trl]"') from error
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST:
        raise ImportError(f"fused_pref.trl needs TRL {needed} or newer; TRL {installed} is installed")


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *HOMES]


_require_trl()
