"""The budget against the paper's Table 7, and both directions against each other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pruning.layouts import layouts
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.budget import average_kept, solve_keep, twig_cuts


@pytest.mark.parametrize(
    ("retain", "trunk", "final_wipe", "keep"),
    [
        (192, 2, 24, 227),
        (128, 2, 24, 134),
        (64, 2, 24, 41),
        (64, 0, 24, 85),
        (64, 1, 24, 64),
        (64, 3, 24, 15),
        (64, 2, 32, 30),
        (64, 2, 20, 50),
    ],
)
def test_published_values(retain, trunk, final_wipe, keep):
    assert solve_keep(retain, 576, 32, trunk, final_wipe) == keep
    assert round(average_kept(keep, 576, 32, trunk, final_wipe)) == retain


@given(layouts(), st.data())
def test_solving_inverts_averaging(layout, data):
    layers, trunk, final_wipe, visual = layout
    keep = data.draw(st.integers(1, visual))
    average = average_kept(keep, visual, layers, trunk, final_wipe)
    assert 0 < average <= visual
    assert solve_keep(average, visual, layers, trunk, final_wipe) == keep


@given(layouts(late=1), st.data())
def test_a_share_stays_after_the_last_cut_and_counts(layout, data):
    layers, trunk, final_wipe, visual = layout
    keep, share = data.draw(st.integers(1, visual)), data.draw(st.floats(0, 1))
    first, last = twig_cuts(keep, visual, layers, trunk, final_wipe, share)
    assert (first.layer, first.keep, last.layer) == (trunk, keep, final_wipe)
    assert abs(last.keep - share * keep) <= 0.5 + 1e-9
    average = average_kept(keep, visual, layers, trunk, final_wipe, share)
    total = visual * trunk + keep * (final_wipe - trunk) + last.keep * (layers - final_wipe)
    assert average == pytest.approx(total / layers)
    solved = solve_keep(average, visual, layers, trunk, final_wipe, share)
    rounded = (layers - final_wipe) / layers / 2  # by the tokens of the last cut
    step = (final_wipe - trunk + share * (layers - final_wipe)) / layers
    assert (
        abs(average_kept(solved, visual, layers, trunk, final_wipe, share) - average) <= 2 * rounded + step / 2 + 1e-6
    )


@given(st.integers(1, 600), st.integers(0, 3), st.integers(4, 8), st.floats(0, 1))
def test_the_ends_of_the_range_are_possible(visual, trunk, final_wipe, share):
    """Rounding the tokens of the last cut moves the average, but never out of what the message names."""
    for keep in (1, visual):
        average = average_kept(keep, visual, 9, trunk, final_wipe, share)
        solved = solve_keep(average, visual, 9, trunk, final_wipe, share)
        rounded = (9 - final_wipe) / (final_wipe - trunk + share * (9 - final_wipe))
        assert abs(solved - keep) <= 0.5 * rounded + 1
    with pytest.raises(TwigVLMError, match=r"for all but a share of 0\.5"):
        solve_keep(700, visual, 9, trunk, final_wipe, 0.5)


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
def test_a_share_is_0_to_1(share):
    with pytest.raises(TwigVLMError, match=f"final_share={share:g}: must be 0 to 1"):
        solve_keep(64, 576, 32, 2, 24, share)


@given(st.floats(0, 700), st.integers(0, 5), st.integers(6, 32))
def test_solved_or_refused_with_the_range(retain, trunk, final_wipe):
    low, high = (average_kept(keep, 576, 32, trunk, final_wipe) for keep in (1, 576))
    step = (final_wipe - trunk) / 32
    if low - step / 2 + 1e-9 < retain < high + step / 2 - 1e-9:
        keep = solve_keep(retain, 576, 32, trunk, final_wipe)
        assert abs(average_kept(keep, 576, 32, trunk, final_wipe) - retain) <= step / 2 + 1e-9
    elif not low - step / 2 - 1e-9 < retain < high + step / 2 + 1e-9:
        with pytest.raises(TwigVLMError, match=f"must be {low:.1f} to {high:.1f} for 576"):
            solve_keep(retain, 576, 32, trunk, final_wipe)


@pytest.mark.parametrize("keep", [0, -1, 577])
def test_impossible_keep(keep):
    with pytest.raises(TwigVLMError, match=f"keep={keep}: must be 1 to 576"):
        average_kept(keep, 576, 32, 2, 24)


@given(st.one_of(st.integers(-5, 2), st.integers(33, 40)))
def test_final_wipe_lies_after_the_trunk(final_wipe):
    with pytest.raises(TwigVLMError, match=f"final_wipe={final_wipe}: must be 3 to 32"):
        solve_keep(64, 576, 32, 2, final_wipe)


@pytest.mark.parametrize("retain", [float("nan"), float("inf"), float("-inf")])
def test_a_budget_is_a_number(retain):
    with pytest.raises(TwigVLMError, match=f"retain={retain}: must be"):
        solve_keep(retain, 576, 32, 2, 24)
