"""Drafting tokens, and verifying them."""
