"""Fused Triton kernels and their launchers; installed as anyup_fast.kernels."""
