"""From prompts to outputs: what a request is checked for, and what it returns."""
