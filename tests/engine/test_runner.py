"""The runner's static shapes, which an accelerator runs, change nothing: no token, no draft, no draw."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.engine.engines import engine_on, make_runner
from tests.tiny import VOCABULARY, prompt
from tests.twigs import grown, step_costs

chains = st.fixed_dictionaries(
    {
        "speculate": st.just("chain"),
        "draft_length": st.integers(1, 6),
        "draft_threshold": st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    }
)
trees = st.fixed_dictionaries(
    {
        "speculate": st.just("tree"),
        "tree_depth": st.integers(1, 4),
        "tree_width": st.sampled_from([1, 2, 5, VOCABULARY // 2]),
        "tree_expand": st.integers(1, 4),
        "tree_nodes": st.sampled_from([1, 3, 10, 30]),
    }
)
adaptive = st.fixed_dictionaries(
    {"speculate": st.just("auto"), "costs": st.just(step_costs(0.3, per_node=0.05)), "tree_width": st.integers(1, 3)}
)
models = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2),
        "trunk": st.sampled_from([0, 2]),
        "reduced": st.booleans(),
        "agreeing": st.booleans(),
        "attention": st.sampled_from(["eager", "sdpa"]),
    }
)
requests = st.lists(
    st.tuples(
        st.integers(0, 9),  # seed of the prompt
        st.integers(0, 4),  # tokens before the image
        st.sampled_from(
            [{}, {"keep": 5}, {"keep": 3, "final_wipe": 4, "final_share": 0.4}, {"keep": 4, "refocus": 0.9}]
        ),
        st.integers(1, 14),  # longest answer
        st.integers(0, 3),  # steps before it joins
        st.sampled_from([None, None, 7, 8]),  # seed, where it is sampled
    ),
    min_size=1,
    max_size=4,
)


def decoded(model, static, speculation, requests, ends):
    """Of each request its tokens and the lengths of its drafts, and where its random numbers have got to."""
    engine = engine_on(model, make_runner(model, static, **speculation))
    rows, generators = [], []
    step = 0
    while len(rows) < len(requests) or engine.busy:
        for seed, before, pruning, new, joins, draws in requests:
            if joins == step:
                options = {**pruning, "max_new_tokens": new, "eos_token_id": ends or None}
                if draws is not None:
                    generators.append(torch.Generator().manual_seed(draws))
                    options |= {"do_sample": True, "top_k": 0, "temperature": 0.8, "generator": generators[-1]}
                rows.append(engine.make_row(prompt(seed, before), **options))
                engine.submit(rows[-1:])
        engine.step()
        step += 1
    return [(row.tokens, row.drafted, row.accepted) for row in rows], [each.get_state().tolist() for each in generators]


@settings(max_examples=25)
# Of one level, all nodes are verified that no pass ran, and the less probable ones are accepted now and then.
@example(
    {"agreeing": False},
    {"speculate": "tree", "tree_depth": 1, "tree_width": 30, "tree_nodes": 30},
    [(seed, seed, {}, 40, 0, None) for seed in range(4)],
    [],
)
@given(models, st.one_of(chains, trees, adaptive), requests, st.lists(st.integers(0, 99), max_size=6, unique=True))
def test_static_shapes_change_nothing(shape, speculation, requests, ends):
    model = grown(**shape)
    assert decoded(model, True, speculation, requests, ends) == decoded(model, False, speculation, requests, ends)
