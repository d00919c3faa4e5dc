"""Computes logits: a Llama-family decoder, an adapter to transformers, and loading."""
