"""Kernels compiled for gfx942 (MI300X), executed on CPU tensors: an emulator of its code, and a launcher for Triton."""
