"""Options of published methods: which values they take, and what the ends of a range mean."""

from math import ceil
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given

from tests.pruning.image_tokens import SIZES, of
from tests.pruning.trunks import grown
from tests.tiny import VISUAL, prompt
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Cut, average_visual
from twigvlm.pruning.methods.dart import Dart
from twigvlm.pruning.methods.fastervlm import FasterVLM
from twigvlm.pruning.methods.holov import HoloV
from twigvlm.pruning.methods.mustdrop import MustDrop
from twigvlm.pruning.methods.prumerge import PruMerge
from twigvlm.pruning.methods.pyramiddrop import PyramidDrop
from twigvlm.pruning.methods.sparsevlm import SparseVLM
from twigvlm.pruning.methods.visionzip import VisionZip
from twigvlm.pruning.methods.vispruner import VisPruner
from twigvlm.pruning.view import CutView


@pytest.mark.parametrize(
    ("method", "option"),
    [
        (VisPruner, {"important": -1.0}), (VisPruner, {"important": 1.5}), (VisPruner, {"important": float("nan")}),
        (VisionZip, {"contextual": -0.5}), (VisionZip, {"contextual": 1.1}), (HoloV, {"segments": 0}),
        (PyramidDrop, {"layers": ()}), (PyramidDrop, {"layers": (8, 2)}), (PyramidDrop, {"layers": (0, 2)}),
        (PruMerge, {"attended": 2.0}), (PruMerge, {"neighbours": 0}), (MustDrop, {"key_share": 2.0}),
        (MustDrop, {"thresholds": (0.0, 0.1)}),
    ],
)  # fmt: skip
def test_options_of_methods_are_checked(method, option):
    ((name, _),) = option.items()
    with pytest.raises(TwigVLMError, match=f"{name}=.*: .*must be ") as caught:
        method(**option)
    assert "\n" not in str(caught.value)


@given(SIZES)
def test_vispruner_without_duplicates_to_remove_ranks_by_attention_alone(size):
    tokens, keep = of(*size)
    chosen = VisPruner(important=1.0).pick(tokens, keep).indices.tolist()
    assert chosen == FasterVLM().pick(tokens, keep).indices.tolist()


def test_sparsevlm_s_true_budgets_keep_the_shapes_of_their_published_lists():
    expected = {192: (271, 181, 107), 128: (195, 89, 49), 64: (24, 12, 7)}
    for retain, sizes in expected.items():
        cuts = SparseVLM("v2").cuts(retain, 576, 32)
        assert [cut.keep for cut in cuts] == pytest.approx(sizes, abs=1)
        assert average_visual(cuts, 576, 32) == pytest.approx(retain, abs=0.5)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(("retain", "visual"), [(160, 576), (70, 576), (64, 144)])
def test_sparsevlm_s_authors_count_a_layer_before_a_cut_with_what_the_cut_leaves(version, retain, visual):
    """For budgets and pictures too that they have not published."""
    cuts = SparseVLM(version, accounting="published").cuts(retain, visual, 32)
    assert [cut.layer for cut in cuts] == [3, 7, 16]
    assert average_visual([Cut(cut.layer - 1, cut.keep) for cut in cuts], visual, 32) == pytest.approx(retain, abs=0.5)
    assert average_visual(cuts, visual, 32) > retain + 1


def test_a_budget_counted_as_published_is_refused_by_the_layers_of_the_cuts():
    with pytest.raises(TwigVLMError, match=r"retain=30: must be .* cuts after layer 3, 7, 16 of 32"):
        SparseVLM(accounting="published").cuts(30, 576, 32)
    with pytest.raises(TwigVLMError, match="cut after layer 6: needs a base of more layers than 6"):
        Dart(6, "published").cuts(8, 16, 6)
    assert Dart(5, "published").cuts(8, 16, 6) == (Cut(5, 12),)


@pytest.mark.parametrize(("visual", "layers", "keys"), [(576, 32, 47), (2880, 32, 231), (576, 28, 47), (32, 6, 3)])
def test_mustdrop_has_room_for_all_key_tokens_if_the_budget_allows_it(visual, layers, keys):
    """Down to cuts that leave nothing else: R̄ 97 of 576 tokens in 32 layers."""
    first = MustDrop().cuts(visual / 2, visual, layers)[0].layer
    least = keys + (visual - keys) * first / layers
    for retain in (least + 0.01, 1.1 * least, 1.5 * least, 0.9 * visual):
        cuts = MustDrop().cuts(retain, visual, layers)
        assert min(cut.keep for cut in cuts) >= keys
        assert average_visual(cuts, visual, layers) == pytest.approx(retain, abs=0.5)
    cuts = MustDrop().cuts(least - 0.5, visual, layers)
    assert cuts[-1].keep < keys <= cuts[0].keep
    assert cuts == MustDrop(key_share=0.0).cuts(least - 0.5, visual, layers)
    if (visual, layers) == (576, 32):
        assert least == pytest.approx(96.6, abs=0.1)
        assert [cut.keep for cut in MustDrop().cuts(192, 576, 32)] == [361, 226, 141, 89]
        assert [cut.keep for cut in MustDrop().cuts(128, 576, 32)] == [243, 102, 47, 47]


@pytest.mark.parametrize("retain", [192, 64])
def test_mustdrop_s_authors_count_a_layer_before_a_cut_with_what_the_cut_leaves(retain):
    cuts = MustDrop(accounting="published").cuts(retain, 576, 32)
    assert average_visual([Cut(cut.layer - 1, cut.keep) for cut in cuts], 576, 32) == pytest.approx(retain, abs=0.5)
    assert average_visual(cuts, 576, 32) > retain + 10
    assert min(cut.keep for cut in cuts) >= (47 if retain > 96 else 1)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_mustdrop_never_drops_a_key_token(seed):
    model, inputs, left = grown(), prompt(seed), []

    class Noting(MustDrop):
        def choose(self, view, keep):
            choice, every = super().choose(view, keep), torch.arange(view.prompt.hidden.shape[1])[None]
            index = every if view.tokens.index is None else view.tokens.index
            left.append({*index[choice.stays].tolist()})
            return choice

    with model.base.watch_vision() as watch:
        captured = model.base.prompt(**inputs, vision=watch)
    visual = captured.visual_mask[0].nonzero()[:, 0]
    pruner = Noting(key_share=0.3)
    count = ceil(0.3 * VISUAL)
    ranked = captured.vision.last_importance[captured.vision.source[0, visual]]
    keys = {*visual[ranked.topk(count).indices].tolist()}
    retain = count + (VISUAL - count) / 6 + 0.5
    model.generate(**inputs, pruner=pruner, retain=retain, max_new_tokens=1)
    assert len(left) == 4
    assert len(left[-1]) < count + 2
    assert all(keys <= each for each in left)


def test_mustdrop_ranks_key_tokens_whatever_the_rest_of_the_batch_and_the_prompt_look_at():
    """Attention to key tokens that differs little, beside a token that almost all of it goes to."""
    count, keep = 576, 20
    total = 1e-4 + 1e-7 * torch.rand(2, count, generator=torch.Generator().manual_seed(0))
    largest = total.clone()
    total[1, -1] = largest[1, -1] = 0.9
    is_key = torch.arange(count).expand(2, -1) < 46

    def choose(rows):
        class Given(MustDrop):
            def _attention(self, view):
                return total[rows], largest[rows]

            def _is_key(self, view):
                return is_key[rows]

        view = Mock(spec=CutView, tokens=Mock(visual=torch.ones(len(rows), count, dtype=torch.bool)))
        return Given(thresholds=(1.0, 0.001)).choose(view, [keep] * len(rows)).stays

    together = choose([0, 1])
    for row in range(2):
        expected = largest[row, :46].argsort(descending=True, stable=True)[:keep].sort().values
        assert together[row].nonzero()[:, 0].tolist() == expected.tolist()
        assert torch.equal(choose([row])[0], together[row])


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 2, 4])
def test_mustdrop_keeps_what_the_question_or_one_of_its_tokens_looks_at(seed):
    """Some tokens win by the sum over the question, others by what a single one of its tokens gives them."""
    model, inputs, (share, single) = grown("eager"), prompt(seed, after=30), (0.01, 0.02)
    pruner = MustDrop(key_share=0.0, thresholds=(share, single))
    first = pruner.cuts(6, VISUAL, 6)[0]
    visual = model.base.visual_mask(inputs["input_ids"])[0].nonzero()[:, 0]
    attention = model.model(**inputs, output_attentions=True).attentions[first.layer - 1][0].mean(0)
    rows = attention[int(visual[-1]) + 1 :, visual]
    total, largest = rows.sum(0) / rows.sum() / share, rows.max(0).values / single
    expected, *others = (
        visual[scores.topk(first.keep).indices].sort().values.tolist()
        for scores in (torch.maximum(total, largest), torch.minimum(total, largest), total, largest)
    )
    assert expected not in others
    output = model.generate(**inputs, pruner=pruner, retain=6, max_new_tokens=1, return_dict_in_generate=True)
    assert output.kept_indices[0].tolist() == expected
