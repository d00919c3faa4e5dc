"""Triton kernels. Importing any module of this package imports triton; nothing does on a machine
that has no use for them. Their oracles are plain torch."""
