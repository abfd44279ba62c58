"""The decoding engine: prompts in, answers out."""
