"""Takes a request from its prompt to its outputs: checks it, tracks it, builds what it returns."""
