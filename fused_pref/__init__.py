"""Memory-efficient CPO, BCO, DPO and KTO losses for large vocabularies."""

import os

import torch

from fused_pref import reference
from fused_pref.cli.explanation import explain
from fused_pref.functional import (
    bco_loss,
    cpo_loss,
    dpo_loss,
    kto_loss,
    linear_bco_loss,
    linear_cpo_loss,
    linear_dpo_loss,
    linear_kto_loss,
    linear_sequence_logps,
    linear_token_logps,
    sequence_logps,
    token_logps,
)
from fused_pref.losses.density_ratio import DensityRatio
from fused_pref.losses.open import Sequences
from fused_pref.losses.reward_shift import RewardShift
from fused_pref.modules import (
    BCOLoss,
    CPOLoss,
    DPOLoss,
    KTOLoss,
    LinearBCOLoss,
    LinearCPOLoss,
    LinearDPOLoss,
    LinearKTOLoss,
)
from fused_pref.ops.backend import triton_obstacle
from fused_pref.outputs import BCOOutput, KTOOutput, PairOutput, PreferenceOutput
from fused_pref.preference import LinearPreferenceLoss, PreferenceLoss, linear_preference_loss, preference_loss
from fused_pref.validate import checks

if os.environ.get("FUSED_PREF_TUNE") == "1":
    from fused_pref.cli import constants as _constants

    _constants.use()
    if triton_obstacle(torch.device("cuda")) is None:
        from fused_pref.cli import tune as _tune  # noqa: F401 - it offers itself to the launches

__version__ = "0.1.0"

__all__ = [
    "BCOLoss",
    "BCOOutput",
    "CPOLoss",
    "DPOLoss",
    "DensityRatio",
    "KTOLoss",
    "KTOOutput",
    "LinearBCOLoss",
    "LinearCPOLoss",
    "LinearDPOLoss",
    "LinearKTOLoss",
    "LinearPreferenceLoss",
    "PairOutput",
    "PreferenceLoss",
    "PreferenceOutput",
    "RewardShift",
    "Sequences",
    "bco_loss",
    "checks",
    "cpo_loss",
    "dpo_loss",
    "explain",
    "kto_loss",
    "linear_bco_loss",
    "linear_cpo_loss",
    "linear_dpo_loss",
    "linear_kto_loss",
    "linear_preference_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "preference_loss",
    "reference",
    "sequence_logps",
    "token_logps",
]
