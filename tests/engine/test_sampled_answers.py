"""Sampling draws what the base's `generate` draws, token for token of a seed, however it is speculated."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.batches import batched
from tests.tiny import prompt
from tests.twigs import grown

WAYS = {
    "none": {},
    "chain": {"speculate": "chain", "draft_threshold": 0.1},
    "tree": {"speculate": "tree", "tree_nodes": 20, "tree_expand": 3},
}
SPECULATING = [way for way in WAYS if way != "none"]
OPTIONS = [
    {},
    {"temperature": 0.6, "top_k": 12},
    {"temperature": 1.5, "top_p": 0.8},
    {"min_p": 0.05, "repetition_penalty": 1.4},
    {"bad_words_ids": [[7], [8, 9]], "typical_p": 0.9},
    {"eos_token_id": list(range(0, 100, 7)), "pad_token_id": 0},
    {"prefix_allowed_tokens_fn": lambda row, ids: [int(ids[-1] * 7 + 3) % 97, int(ids[-1] + 1) % 97, 5]},
]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), options=st.sampled_from(OPTIONS), reduced=st.booleans())
def test_a_seed_gives_what_the_bases_generate_gives(way, seed, options, reduced):
    model, inputs = grown(reduced=reduced), prompt(seed % 40)
    options = {"top_k": 0, **options, "do_sample": True, "max_new_tokens": 14}
    torch.manual_seed(seed)
    expected = model.model.generate(**inputs, **options)
    torch.manual_seed(seed)
    assert model.generate(**inputs, **options, **WAYS[way]).tolist() == expected.tolist()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("given", [True, False], ids=["a generator", "torch's own"])
def test_what_is_drawn_after_an_answer_does_not_depend_on_drafts(way, given):
    """A second answer goes on with the stream as if nobody had drafted for the first."""
    ends = {"eos_token_id": list(range(0, 100, 7)), "pad_token_id": 0}
    model, options = grown(), {"do_sample": True, "top_k": 0, "max_new_tokens": 12, **ends}
    torch.manual_seed(3)
    expected = [model.model.generate(**prompt(seed), **options).tolist() for seed in range(4)]
    torch.manual_seed(3)
    stream = {"generator": torch.Generator().manual_seed(3)} if given else {}
    drawn = [model.generate(**prompt(seed), **options, **WAYS[way], **stream).tolist() for seed in range(4)]
    assert drawn == expected


@pytest.mark.parametrize("way", SPECULATING)
def test_pruned_samples_do_not_depend_on_speculation(way):
    model, options = grown(), {"keep": 4, "final_wipe": 4, "do_sample": True, "top_k": 0, "max_new_tokens": 16}
    for seed in range(8):
        plain, drafted = (
            model.generate(**prompt(seed), **options, **speculation, generator=torch.Generator().manual_seed(seed))
            for speculation in ({}, WAYS[way])
        )
        assert plain.tolist() == drafted.tolist()


def test_different_seeds_differ():
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 8, "speculate": "chain"}
    drawn = {
        tuple(grown().generate(**prompt(), **options, generator=torch.Generator().manual_seed(seed))[0].tolist())
        for seed in range(6)
    }
    assert len(drawn) > 3


def test_the_twig_draws_what_the_base_will_draw():
    """Drafting with the base's noise: a twig that agrees is accepted as often as when greedy, however flat the scores."""
    options = {"speculate": "chain", "draft_threshold": 0.0, "max_new_tokens": 24, "return_dict_in_generate": True}
    accepted = drafted = 0
    for seed in range(8):
        output = grown().generate(**prompt(seed), **options, do_sample=True, temperature=1.3, top_k=0)
        accepted, drafted = accepted + sum(output.accepted_lengths[0]), drafted + sum(output.drafted_lengths[0])
    assert accepted > 0.5 * drafted


@pytest.mark.parametrize("way", SPECULATING)
def test_several_answers_to_one_prompt(way):
    model = grown()
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 10, "num_return_sequences": 3}
    drawn = [
        model.generate(**prompt(), **options, **speculation, generator=torch.Generator().manual_seed(5))
        for speculation in ({}, WAYS[way])
    ]
    assert torch.equal(*drawn)
    assert len({tuple(row) for row in drawn[0].tolist()}) == 3


def test_rows_of_a_batch_draw_for_themselves():
    """What a row draws does not depend on how long the others' answers are."""
    model, options = grown(), {"do_sample": True, "top_k": 0, "max_new_tokens": 12, "pad_token_id": 0}
    batch = batched([prompt(1), prompt(2, 5, 3)])
    free, cut = (
        model.generate(**batch, **options, **ends, speculate="chain", generator=torch.Generator().manual_seed(3))
        for ends in ({}, {"eos_token_id": list(range(50))})
    )
    width = batch["input_ids"].shape[1]
    for row in range(2):
        answer = cut[row, width:].tolist()
        length = next((place + 1 for place, token in enumerate(answer) if token < 50), len(answer))
        assert answer[:length] == free[row, width : width + length].tolist()


def _chi_square(counts, expected):
    """p-value of counts under expected counts, cells of fewer than five put together."""
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


ALLOWED = (3, 11, 27, 64)


def _distribution(model, inputs, temperature):
    """Exact probabilities of all answers of three of the allowed tokens, from the base's logits."""

    def after(tokens):
        ids = torch.cat((inputs["input_ids"], torch.tensor([tokens], dtype=torch.long)), dim=1)
        with torch.no_grad():
            logits = model.model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
        return (logits[0, -1, list(ALLOWED)].double() / temperature).softmax(dim=-1)

    first = after([])
    second = torch.stack([after([one]) for one in ALLOWED])
    third = torch.stack([torch.stack([after([one, other]) for other in ALLOWED]) for one in ALLOWED])
    return first[:, None, None] * second[:, :, None] * third


@pytest.mark.parametrize("way", ["chain", "tree"])
def test_three_tokens_have_the_bases_distribution(way, pytestconfig):
    """Not by way of the base's own draws."""
    draws, seeds = pytestconfig.getoption("draws"), pytestconfig.getoption("seeds")
    model, inputs, rows = grown(), prompt(4), 250
    options = {"suppress_tokens": [token for token in range(100) if token not in ALLOWED], "temperature": 1.2}
    options |= {"do_sample": True, "top_k": 0, "max_new_tokens": 3, "num_return_sequences": rows, **WAYS[way]}
    share = _distribution(model, inputs, options["temperature"])
    place = torch.zeros(100, dtype=torch.long).index_copy(0, torch.tensor(ALLOWED), torch.arange(4))
    together = torch.zeros(share.numel(), dtype=torch.float64)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.zeros_like(together)
        for _ in range(draws // rows):
            answers = model.generate(**inputs, **options, generator=generator)[:, inputs["input_ids"].shape[1] :]
            cells = (place[answers] * torch.tensor([16, 4, 1])).sum(dim=1)
            counts += torch.bincount(cells, minlength=len(counts))
        print(f"{way}, seed {seed}, {draws} draws: p = {_chi_square(counts, share.flatten() * draws):.4f}")
        together += counts
    p = _chi_square(together, share.flatten() * together.sum())
    print(f"{way}, all {int(together.sum())} draws: p = {p:.4f}")
    assert p > 1e-3


def test_the_rule_draws_from_the_target_exactly():
    """In float64 and without sampling: over a fine grid of exponential noise, each of three tokens is chosen in the share
    that its probability says."""
    target = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    steps = 60
    grid = -torch.log1p(-(torch.arange(steps, dtype=torch.float64) + 0.5) / steps)
    noise = torch.tensor(list(itertools.product(grid.tolist(), repeat=3)), dtype=torch.float64)
    share = torch.bincount((target / noise).argmax(dim=-1), minlength=3) / len(noise)
    torch.testing.assert_close(share.double(), target, atol=0.01, rtol=0)
