"""The commands of ``python -m fused_pref``. No loss imports them."""
