"""Accuracy, speed and exactness of a twig against its base and against other ways to prune, measured in one run."""
