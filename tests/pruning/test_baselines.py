import torch

from tests.pruning.test_scores import after_trunk
from tests.tiny import VISUAL
from twigvlm.pruning.methods.random import RandomScores


def test_random_choice_is_seeded_and_even():
    trunk = after_trunk("sdpa")
    assert torch.equal(RandomScores(1)(trunk), RandomScores(1)(trunk))
    state = torch.get_rng_state()
    counts = torch.zeros(trunk.hidden.shape[1])
    for seed in range(400):
        scores = RandomScores(seed)(trunk)[0].masked_fill(~trunk.prompt.visual_mask[0], -1)
        counts[scores.topk(VISUAL // 4).indices] += 1
    assert torch.equal(torch.get_rng_state(), state)
    visual = counts[trunk.prompt.visual_mask[0]]
    assert visual.sum() == 400 * VISUAL // 4
    assert 70 < visual.min() <= visual.max() < 130  # 100 expected, standard deviation 8.7
