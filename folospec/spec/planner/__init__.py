"""Plans what drafting pays in every step, from acceptance and cost."""
