"""Holds the operations with several implementations: torch, native CPU kernels, Triton."""
