"""Twigs in other people's programs."""
