"""The base: transformers' models as the rest of the library sees them."""
