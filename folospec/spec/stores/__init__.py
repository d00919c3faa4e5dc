"""Stores what followed which tokens: the memory of drafters without a model."""
