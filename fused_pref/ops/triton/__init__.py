"""The Triton backend; every module of it imports Triton.

Kernels end in ``_kernel``, their launchers have the name of the operation. Shapes are given as ``# [N, V]``.
A batch has N_total positions, S·T where it is padded.
"""
