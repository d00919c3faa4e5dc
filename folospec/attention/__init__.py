"""Lets the rows of a step see paged KV: chunks of prompts, chains and trees."""
