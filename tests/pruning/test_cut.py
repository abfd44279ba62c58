"""One budget for all methods: the average of the visual tokens that enter a layer, against the published tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pruning.layouts import layouts
from tests.pruning.references import Loudest
from tests.pruning.trunks import grown
from tests.tiny import VISUAL, prompt
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.budget import solve_keep
from twigvlm.pruning.cut import Cut, Pruner, average_visual
from twigvlm.pruning.methods.twig import TwigPruner
from twigvlm.pruning.methods.twig_attention import TwigAttention


@st.composite
def schedules(draw):
    """Visual tokens, layers, and cuts in their order, of which several may follow the same layer."""
    visual, layers = draw(st.integers(0, 3000)), draw(st.integers(1, 60))
    at = sorted(draw(st.lists(st.integers(0, layers), max_size=5)))
    keeps = sorted((draw(st.integers(0, visual)) for _ in at), reverse=True)
    return visual, layers, tuple(Cut(layer, keep) for layer, keep in zip(at, keeps, strict=True))


@given(schedules())
def test_the_budget_is_the_average_over_the_layers(schedule):
    visual, layers, cuts = schedule
    total, left = 0, visual
    for layer in range(layers):
        for cut in cuts:
            left = cut.keep if cut.layer == layer else left
        total += left
    assert average_visual(cuts, visual, layers) == pytest.approx(total / layers)


def _average(*cuts, visual=576, layers=32):
    return average_visual([Cut(layer, keep) for layer, keep in cuts], visual, layers)


@pytest.mark.parametrize(("retain", "keep"), [(192, 227), (128, 134), (64, 41)])
def test_twigvlm(retain, keep):
    """Table 7: K = 2, K_f = 24."""
    assert solve_keep(retain, 576, 32, 2, 24) == keep
    assert round(_average((2, keep), (24, 0))) == retain


@pytest.mark.parametrize(("retain", "after_two", "after_three"), [(192, 166, 152), (128, 98, 82), (64, 30, 11)])
def test_fastv(retain, after_two, after_three):
    """One cut after layer K."""
    for layer, keep in ((2, after_two), (3, after_three)):
        assert round(_average((layer, keep))) == retain
        assert solve_keep(retain, 576, 32, layer, 32) == keep


def test_pyramiddrop():
    """Half of the tokens leave after layers 8, 16 and 24; however many leave there, 144 is the least."""
    assert _average((8, 288), (16, 144), (24, 72)) == 270
    assert _average((8, 0), (16, 0), (24, 0)) == 144


@pytest.mark.parametrize(
    ("layers", "keeps", "retain"),
    [
        ((2, 8, 16), (322, 180, 101), 192),
        ((2, 8, 16), (242, 101, 43), 128),
        ((2, 8, 16), (110, 21, 4), 64),
        ((2, 6, 15), (334, 194, 112), 192),
        ((2, 6, 15), (258, 115, 52), 128),
        ((2, 6, 15), (130, 29, 7), 64),
    ],
)
def test_pyramiddrop_at_equal_budgets(layers, keeps, retain):
    assert round(_average(*zip(layers, keeps, strict=True))) == retain


@pytest.mark.parametrize(
    ("keeps", "average"),
    [
        ((300, 200, 118), 206.8),
        ((238, 108, 60), 144.1),
        ((66, 34, 20), 81.8),
        ((271, 181, 107), 192.3),
        ((195, 89, 49), 127.9),
        ((24, 12, 7), 63.9),
        ((280, 185, 102), 192.0),
        ((253, 95, 32), 128.3),
        ((29, 11, 6), 63.7),
    ],
)
def test_sparsevlm(keeps, average):
    """Published as 192, 128 and 64 first; layers 3, 7 and 16 rank, and count with all that enters them."""
    assert _average(*zip((3, 7, 16), keeps, strict=True)) == pytest.approx(average, abs=0.051)


@pytest.mark.parametrize(("keep", "average"), [(196, 219.8), (132, 159.8), (68, 99.8)])
def test_dart(keep, average):
    """Published as 192, 128 and 64, which it keeps after layer 2, and four more."""
    assert _average((2, keep)) == pytest.approx(average, abs=0.051)


@pytest.mark.parametrize("keep", [192, 128, 64])
def test_before_the_decoder_the_budget_is_what_is_kept(keep):
    assert _average((0, keep)) == keep


@pytest.mark.parametrize("average", [171, 149, 107, 85])
def test_a_budget_is_met_as_nearly_as_tokens_allow(average):
    keep = solve_keep(average, 576, 32, 2, 24)
    distances = {near: abs(_average((2, near), (24, 0)) - average) for near in range(keep - 2, keep + 3)}
    assert min(distances, key=distances.__getitem__) == keep


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ([(3, 5), (2, 1)], "cut after layer 2: must be 3 to 32, in the order of the layers"),
        ([(33, 5)], "cut after layer 33: must be 0 to 32"),
        ([(-1, 5)], "cut after layer -1: must be 0 to 32"),
        ([(2, 577)], "keep=577: must be 0 to 576, the visual tokens before this cut"),
        ([(2, -1)], "keep=-1: must be 0 to 576"),
        ([(2, 50), (4, 51)], "keep=51: must be 0 to 50, the visual tokens before this cut"),
    ],
)
def test_impossible_cuts(cuts, message):
    with pytest.raises(TwigVLMError, match=message):
        _average(*cuts)


@given(layouts(), st.data())
def test_the_twigs_own_cuts_meet_the_budget(layout, data):
    layers, trunk, final_wipe, visual = layout
    wanted = (Cut(trunk, data.draw(st.integers(1, visual))), *([Cut(final_wipe, 0)] if final_wipe < layers else ()))
    pruner = TwigPruner(TwigAttention(), trunk, final_wipe)
    assert isinstance(pruner, Pruner)
    assert pruner.cuts(average_visual(wanted, visual, layers), visual, layers) == wanted
    told = TwigPruner(TwigAttention(), trunk, final_wipe, keep=wanted[0].keep)
    assert told.cuts(None, visual, layers) == wanted


def test_the_twigs_own_cuts_name_what_is_possible():
    pruner = TwigPruner(TwigAttention(), 2, 24, keep=20)
    with pytest.raises(TwigVLMError, match="keep=20: must be 1 to 16, the visual tokens of this prompt"):
        pruner.cuts(None, 16, 32)
    with pytest.raises(TwigVLMError, match=r"retain=15: must be 1\.7 to 12\.0 for 16 visual tokens"):
        pruner.cuts(15, 16, 32)


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ((Cut(3, 5), Cut(2, 1)), "cut after layer 2: must be 3 to 6, in the order of the layers"),
        ((Cut(7, 5),), "cut after layer 7: must be 0 to 6"),
        ((Cut(2, 4), Cut(4, VISUAL)), "keep=16: must be 0 to 4, the visual tokens before this cut"),
    ],
)
def test_a_pruner_of_impossible_cuts_is_refused(cuts, message):
    model, inputs = grown(), prompt()
    with pytest.raises(TwigVLMError, match=message):
        model.generate(**inputs, pruner=Loudest(cuts), max_new_tokens=2)
    engine = model.engine(max_rows=2)
    with pytest.raises(TwigVLMError, match=message):
        engine.add(inputs, pruner=Loudest(cuts), max_new_tokens=2)
    id = engine.add(inputs, max_new_tokens=2)
    with pytest.raises(TwigVLMError, match=message):
        engine.fork(id, Loudest(cuts))
    assert len(engine.waiting) == 1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"keep": 3}, "keep"),
        ({"retain": 8, "final_wipe": 4}, "final_wipe"),
        ({"retain": 8, "scorer": TwigAttention()}, "scorer"),
        ({"retain": 8, "retain_per_image": True}, "retain_per_image"),
    ],
)
def test_options_of_the_twigs_own_pruning_do_not_apply_to_another(options, name):
    with pytest.raises(TwigVLMError, match=f"{name}: belongs to the twig's own pruning; leave it out beside pruner"):
        grown().generate(**prompt(), pruner=Loudest((Cut(2, 3),)), max_new_tokens=2, **options)
