"""Math on chunks of logits, in PyTorch and in Triton. A leaf: nothing here imports objectives or heads.

:mod:`fused_pref.ops.interface` says what a backend does; :mod:`fused_pref.ops.torch` and :mod:`fused_pref.ops.triton`
do it.
"""
