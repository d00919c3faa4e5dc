"""Turns token ids into text, and texts and conversations into prompts."""
