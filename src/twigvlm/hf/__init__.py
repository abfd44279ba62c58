"""Between Hugging Face's `generate` and the engine."""
