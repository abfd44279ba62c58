"""Train a twig on a frozen base."""
