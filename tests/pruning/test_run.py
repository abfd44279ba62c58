"""Cuts between layers, against prompts by themselves whose tokens are dropped."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import families
from tests.batches import batched
from tests.families import LAYERS, TRUNK, TWIG
from tests.pruning.references import Alone, Loudest, Noting, answer_by_dropping, logits_by_hiding, loudest
from tests.pruning.trunks import PROMPTS, WAYS, embedded
from tests.tiny import VISUAL, prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM, TwigVLMError
from twigvlm.kv.cache import KVCache
from twigvlm.pruning.cut import Cut
from twigvlm.pruning.run import run_cuts


@cache
def grown(attention="sdpa"):
    """A twig that is often right, as in `tests.families`."""
    return TwigVLM.grow(
        tiny_llava(attention=attention, deep_scale=0.1, from_layer=TRUNK + TWIG), TwigConfig(TRUNK, TWIG)
    )


@st.composite
def runs(draw):
    """A range of layers, and cuts for one to three rows at the same layers, of no more tokens than there are."""
    start = draw(st.integers(0, LAYERS))
    stop = draw(st.integers(start, LAYERS))
    at = sorted(draw(st.lists(st.integers(start, stop), max_size=4)))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        keeps = draw(st.lists(st.integers(0, VISUAL), min_size=len(at), max_size=len(at)))
        rows.append([Cut(layer, keep) for layer, keep in zip(at, sorted(keeps, reverse=True), strict=True)])
    return start, stop, rows


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@given(runs())
@torch.no_grad()
def test_cuts_drop_tokens_and_nothing_else(attention, run):
    start, stop, cuts = run
    base, prompts = grown(attention).base, PROMPTS[: len(cuts)]
    before = embedded(grown(attention), batched(prompts))
    expected = []
    for row, inputs in enumerate(prompts):
        count = inputs["input_ids"].shape[1]
        expected.append(Alone(before.hidden[row, :count], before.visual[row, :count], torch.arange(count)))
    entered = [alone.through(base, start, stop, of_row) for alone, of_row in zip(expected, cuts, strict=True)]

    cache = KVCache(LAYERS, (), 4, base.device)
    rows = cache.claim(len(prompts))
    for view in (None, cache.view(rows)):
        left = run_cuts(
            base,
            before,
            start,
            stop,
            cuts,
            lambda tokens, layer, keep: loudest(tokens.hidden, tokens.visual, keep),
            base.masks(),
            view,
        )
        assert left.lengths == tuple(len(alone.hidden) for alone in expected)
        for row, alone in enumerate(expected):
            count = len(alone.hidden)
            torch.testing.assert_close(left.hidden[row, :count], alone.hidden, rtol=1e-4, atol=1e-4)
            assert torch.equal(left.visual[row, :count], alone.visual)
            assert not left.visual[row, count:].any()  # padding is no visual token
            torch.testing.assert_close(left.last[row], alone.hidden[-1], rtol=1e-4, atol=1e-4)
    for layer in range(start, stop):
        assert cache.held(layer, rows).lengths.tolist() == [counts[layer - start] for counts in entered]


@torch.no_grad()
def test_nobody_chooses_where_all_leave():
    model = grown()
    base, before = model.base, embedded(model, prompt())

    def choose(*_):
        raise AssertionError

    left = run_cuts(base, before, 0, LAYERS, [[Cut(3, 0), Cut(5, 0)]], choose, base.masks())
    assert left.lengths == (9,)


SCHEDULES = [
    (Cut(0, 9), Cut(1, 5), Cut(2, 2)),  # all before the twig's prompt is complete, and at its end
    (Cut(1, 12), Cut(3, 6), Cut(5, 0)),
    (Cut(2, 7), Cut(3, 4), Cut(4, 1)),
    (Cut(2, 8), Cut(2, 4), Cut(6, 0)),
    (Cut(3, 8), Cut(4, 8), Cut(5, 3)),
]


@cache
def expected(cuts):
    """The answers of the prompts, each by itself."""
    return [answer_by_dropping(grown().base, inputs, cuts, 6) for inputs in PROMPTS]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "cuts",
    [*SCHEDULES, (Cut(4, 0),), (Cut(0, 0),), (Cut(2, 0),), (Cut(1, 3),)],
    ids=lambda cuts: " ".join(f"{cut.layer}:{cut.keep}" for cut in cuts),
)
def test_an_answer_is_that_of_a_prompt_whose_tokens_are_dropped(cuts, way):
    """In the prefill and in decoding; a batch gives what each prompt gets alone."""
    options = {"pruner": Loudest(cuts), "max_new_tokens": 6, **WAYS[way]}
    for inputs, tokens in zip(PROMPTS, expected(cuts), strict=True):
        got = grown().generate(**inputs, **options)
        assert got[0, inputs["input_ids"].shape[1] :].tolist() == tokens
    batch = batched(PROMPTS)
    together = grown().generate(**batch, **options)
    assert together[:, batch["input_ids"].shape[1] :].tolist() == expected(cuts)


@pytest.mark.parametrize(("cuts", "kept"), [((Cut(0, 0),), 0), ((Cut(3, 0),), 0), ((Cut(2, 3),), 3)])
def test_what_a_prompt_kept_is_told_also_where_it_is_nothing(cuts, kept):
    output = grown().generate(**PROMPTS[0], pruner=Loudest(cuts), max_new_tokens=2, return_dict_in_generate=True)
    assert len(output.kept_indices[0]) == kept


class Greedy(Loudest):
    """Keeps one token more than it is asked to."""

    def choose(self, view, keep):
        return super().choose(view, [count + 1 for count in keep])


def test_a_pruner_that_keeps_another_number_than_its_schedule_says_is_refused():
    with pytest.raises(
        TwigVLMError, match=r"kept \[5\] visual tokens at its cut after layer 2, where its schedule has \[4\]"
    ):
        grown().generate(**PROMPTS[0], pruner=Greedy((Cut(2, 4),)), max_new_tokens=2)


def test_these_cuts_matter():
    """Or else the test above would pass whatever they do."""
    answers = {str(expected(cuts)) for cuts in ((), *SCHEDULES)}
    assert len(answers) == len(SCHEDULES) + 1


def _of_family(name, attention="sdpa"):
    hf_model = families.tiny(name, attention)
    return TwigVLM.grow(hf_model, TwigConfig(TRUNK, TWIG)), families.prompt(hf_model, name, "images")


@pytest.mark.parametrize("name", families.TINY)
def test_cuts_that_keep_everything_change_nothing(name):
    model, inputs = _of_family(name)
    visual = int(model.base.visual_mask(inputs["input_ids"]).sum())
    cuts = tuple(Cut(layer, visual) for layer in (0, 2, 4))
    got = model.generate(**inputs, pruner=Loudest(cuts), max_new_tokens=8, **WAYS["chain"])
    with model.disabled():
        assert torch.equal(got, model.generate(**inputs, max_new_tokens=8, do_sample=False))


class Scores(list):
    """A logits processor that notes the scores that the base chose by, and forbids placeholders.

    An answer of them would be a prompt of them to the reference.
    """

    def __call__(self, ids, scores):
        self.append(scores[0].clone())
        scores[:, [families.IMAGE, families.VIDEO]] = float("-inf")
        return scores


@pytest.mark.parametrize("layers", [(0, 1, 3), (1, 2, 4), (3, 4, 5)])
@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl", "qwen3_vl", "gemma3"])
def test_every_family_only_loses_what_was_not_chosen(name, layers):
    """In windows, with M-RoPE, with features for later layers, and with images whose tokens see one another."""
    (model, inputs), scores = _of_family(name), Scores()
    visual = int(model.base.visual_mask(inputs["input_ids"]).sum())
    cuts = tuple(Cut(layer, visual // share) for layer, share in zip(layers, (2, 3, 6), strict=True))
    pruner = Noting(cuts)
    got = model.generate(**inputs, pruner=pruner, max_new_tokens=6, logits_processor=[scores])
    assert [len(positions) for positions in pruner.left] == [cut.keep for cut in cuts]
    tokens = got[0, inputs["input_ids"].shape[1] :].tolist()
    reference = _of_family(name, "eager")[0]
    hidden = logits_by_hiding(reference, inputs, cuts, pruner.left, tokens[:-1])
    torch.testing.assert_close(torch.stack(scores), hidden, rtol=1e-3, atol=1e-3)
    everything = logits_by_hiding(reference, inputs, (), (), tokens[:-1])
    assert (hidden - everything).abs().max() > 0.02  # hiding them matters in this model
    options = {"max_new_tokens": 6, "logits_processor": [Scores()]}
    for way in ("chain", "tree", "auto"):
        assert torch.equal(model.generate(**inputs, pruner=Loudest(cuts), **options, **WAYS[way]), got)


def _without_first(inputs, count):
    """A prompt without its first tokens, which are text."""
    per_token = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    return {name: value[:, count:] if name in per_token else value for name, value in inputs.items()}


@pytest.mark.parametrize("layers", [(0, 1, 3), (2, 3, 5)])
@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl", "qwen3_vl", "gemma3"])
def test_rows_of_a_batch_are_cut_as_if_alone(name, layers):
    model, inputs = _of_family(name)
    rows = [inputs, _without_first(families.prompt(model.model, name, "images", seed=1), 2)]
    cuts = tuple(Cut(layer, keep) for layer, keep in zip(layers, (11, 6, 2), strict=True))
    options = {"pruner": Loudest(cuts), "max_new_tokens": 6, "return_dict_in_generate": True}
    batch = batched(rows)
    alone = [model.generate(**row, **options) for row in rows]
    for way in WAYS.values():
        together = model.generate(**batch, **options, **way)
        for number, row in enumerate(rows):
            count, padding = row["input_ids"].shape[1], batch["input_ids"].shape[1] - row["input_ids"].shape[1]
            assert together.sequences[number, count + padding :].tolist() == alone[number].sequences[0, count:].tolist()
            assert together.kept_indices[number].tolist() == (alone[number].kept_indices[0] + padding).tolist()
