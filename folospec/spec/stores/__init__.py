"""What has followed what, and what became of it: the memory of drafters without a model."""
