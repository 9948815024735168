"""TRL's own CPO classes, imported without the notice that they are experimental."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
    try:
        from trl.experimental.cpo import CPOConfig as StockCPOConfig
        from trl.experimental.cpo import CPOTrainer as StockCPOTrainer
    except ImportError as error:
        raise ImportError(
            "fused_pref.trl.CPOTrainer needs a TRL with trl.experimental.cpo, such as TRL 1.16"
        ) from error

__all__ = ["StockCPOConfig", "StockCPOTrainer"]
