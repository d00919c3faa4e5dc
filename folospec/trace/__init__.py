"""What a step did, as data: the records, and who takes them."""
