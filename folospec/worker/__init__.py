"""Runs the models, and owns every KV tensor."""
