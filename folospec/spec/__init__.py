"""Proposes drafts and verifies them."""
