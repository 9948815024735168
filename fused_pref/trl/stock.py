"""TRL's own CPO classes, imported without the notice that they are experimental; where TRL has none, ours."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
    try:
        from trl.experimental.cpo import CPOConfig as StockCPOConfig
        from trl.experimental.cpo import CPOTrainer as StockCPOTrainer
    except ImportError:
        from fused_pref.trl.plain_cpo import PlainCPOConfig as StockCPOConfig
        from fused_pref.trl.plain_cpo import PlainCPOTrainer as StockCPOTrainer

__all__ = ["StockCPOConfig", "StockCPOTrainer"]
