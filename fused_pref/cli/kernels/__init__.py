"""``python -m fused_pref kernels``: what every kernel compiles to, for GPUs that need not be there."""
