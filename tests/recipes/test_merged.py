"""Dropped visual tokens that merge into kept ones."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.sapling.merged import merge

ROW = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


@given(st.lists(st.sampled_from(["text", "kept", "dropped"]), min_size=8, max_size=8), st.floats(0, 1))
def test_only_kept_visual_tokens_change_and_stay_between_what_is_mixed(kinds, share):
    visual = torch.tensor([kind != "text" for kind in kinds])
    stays = torch.tensor([kind == "kept" for kind in kinds])
    merged = merge(ROW, visual, stays, share)
    assert torch.equal(merged[~stays], ROW[~stays])
    if not stays.any():
        return
    assert bool((merged <= ROW[visual].amax(dim=0) + 1e-5)[stays].all())
    assert bool((merged >= ROW[visual].amin(dim=0) - 1e-5)[stays].all())
    if share == 0:
        torch.testing.assert_close(merged, ROW)


def test_a_dropped_token_merges_into_the_kept_one_of_its_direction():
    states = torch.tensor([[1.0, 0.0], [0.0, 1.0], [4.0, 0.0], [2.0, 0.1]])
    merged = merge(states, torch.ones(4, dtype=torch.bool), torch.tensor([True, True, False, False]), 0.5)
    torch.testing.assert_close(merged[0], torch.tensor([2.0, 0.025]))  # half of it, and half of the mean of both
    assert torch.equal(merged[1], states[1])
