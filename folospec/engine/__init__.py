"""Runs the steps, and offers them as `LLM` and `LLMEngine`."""
