"""Benchmarks; `README.md` says which command answers which question."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Of the repository."""
