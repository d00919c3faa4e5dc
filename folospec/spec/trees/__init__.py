"""Shapes drafts as chains and trees, and fills them with a draft model's tokens."""
