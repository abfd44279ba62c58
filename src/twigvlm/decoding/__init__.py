"""Prefill with pruning, draft, verify, commit."""
