"""The base's choices, as functions of plain lists and tensors."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.decoding.test_tree import branches, planted
from twigvlm.speculation.tree import walk

from twigvlm.engine.sampling import Sampling


@given(branches, st.integers(0, 2**16))
def test_processors_see_each_accepted_position_once_and_no_other(branches, seed):
    tree = planted(branches)
    logits = torch.randn(len(tree), 5, generator=torch.Generator().manual_seed(seed))
    path, choices = walk(tree, Sampling().choices(logits, None, 0))
    assert choices == [int(logits[node].argmax()) for node in path]
    prompt_ids, seen = torch.tensor([[7, 8]]), []

    def processor(ids, scores):
        seen.append(ids[0].tolist())
        assert scores.dtype == torch.float32
        return scores

    half = logits.half()
    processed = walk(tree, Sampling(processor).choices(half, prompt_ids, 0))
    assert processed == walk(tree, Sampling().choices(half, None, 0))
    seen.clear()
    assert walk(tree, Sampling(processor).choices(logits, prompt_ids, 0)) == (path, choices)
    assert seen == [[7, 8, *(tree.tokens[node] for node in path[1 : length + 1])] for length in range(len(path))]


def test_processors_work_on_a_copy():
    logits = torch.zeros(1, 3)
    processor = lambda ids, scores: scores.add_(torch.tensor([0, 0, 1]))  # noqa: E731
    choose = Sampling(processor).choices(logits, torch.tensor([[1]]), 0)
    assert choose(0, []) == 2
    assert torch.equal(logits, torch.zeros(1, 3))
