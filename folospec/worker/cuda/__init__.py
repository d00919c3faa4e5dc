"""Runs passes as CUDA graphs."""
