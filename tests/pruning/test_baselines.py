"""Random choice, the floor that any ranking must beat."""

import torch

from tests.pruning.trunks import after_trunk, grown
from tests.tiny import VISUAL, prompt
from twigvlm.pruning.methods.random import RandomScores, RandomTokens


def test_random_choice_is_seeded_and_even():
    trunk = after_trunk(grown())
    visual = trunk.tokens.visual[0]
    assert torch.equal(RandomScores(1)(trunk), RandomScores(1)(trunk))
    state = torch.get_rng_state()
    counts = torch.zeros(len(visual))
    for seed in range(400):
        scores = RandomScores(seed)(trunk)[0].masked_fill(~visual, -1)
        counts[scores.topk(VISUAL // 4).indices] += 1
    assert torch.equal(torch.get_rng_state(), state)
    assert counts.sum() == 400 * VISUAL // 4
    assert 70 < counts[visual].min() <= counts.max() < 130  # 100 expected, standard deviation 8.7


def test_prompts_of_one_length_do_not_share_a_random_choice():
    model, choices = grown(), []
    for seed in range(3):
        options = {"retain": 8, "max_new_tokens": 1, "return_dict_in_generate": True}
        found = [
            model.generate(**prompt(seed), pruner=RandomTokens(0, 1), **options).kept_indices[0].tolist()
            for _ in range(2)
        ]
        assert found[0] == found[1]
        choices.append(found[0])
    assert choices[0] != choices[1] != choices[2]
