"""Triton kernels. Every module of it but :mod:`fused_pref.ops.triton.report` imports Triton.

Kernels end in ``_kernel``, their launchers have the name of the operation. Shapes are given as ``# [N, V]``.
"""
