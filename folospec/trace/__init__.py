"""Records what a step did, as data."""
