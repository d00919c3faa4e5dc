"""The check that a GPU has to pass: `python -m gpu_check`; docs/gpu.md."""
