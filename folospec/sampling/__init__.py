"""Turns logits into distributions and tokens, with keyed noise."""
