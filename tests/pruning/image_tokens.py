"""An image of random tokens, as methods see it that choose before the decoder."""

import torch
from hypothesis import strategies as st

from twigvlm.base.vision import Vision
from twigvlm.pruning.images import ImageTokens

SIZES = st.tuples(st.integers(0, 10**6), st.integers(5, 40), st.floats(0.05, 0.95))
WIDTH = 12


class Projection(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, states):
        return (states @ self.weight).tanh()


def image(seed, count, cls=True, width=WIDTH, shared=0.0):
    """An image of random tokens, in the middle of two others; features resemble each other by what is `shared`."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    total, weight = 3 * count, random(width, width)
    numbers = torch.arange(3).repeat_interleave(count)
    vision = Vision(
        torch.arange(total)[None],
        random(total, width),
        numbers,
        random(total, width) + shared,
        Projection(weight),
        None,
        torch.ones(total, dtype=torch.bool),
        1,
        cls,
        dict(enumerate(random(3, width).split(1))) if cls else {},
    )
    importance = random(total).softmax(0)
    vision._importance.update(mean=importance, sum=4 * importance)
    for name, value in (
        ("keys", random(total, width)),
        ("last_keys", random(total, width)),
        ("single_head", importance),
    ):
        vision.__dict__[name] = value  # as `cached_property` does
    return ImageTokens(vision, torch.arange(count, 2 * count), random(5, width), torch.arange(2, 7))


def of(seed, count, share, **options):
    return image(seed, count, **options), max(1, min(count - 1, int(share * count)))
