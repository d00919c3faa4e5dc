"""The shapes of drafts, and how a drafter with a model fills them."""
