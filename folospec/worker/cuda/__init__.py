"""Passes that run as CUDA graphs."""
