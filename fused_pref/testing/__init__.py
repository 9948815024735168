"""How exact a loss is: against float64, and beside the other implementations that are installed."""

from fused_pref.testing.parity import Parity, check_parity

__all__ = ["Parity", "check_parity"]
