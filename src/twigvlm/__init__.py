"""Grow a twig on a vision-language model: prune visual tokens, draft answer tokens, keep the answer."""
