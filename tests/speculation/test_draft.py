"""Drafts of several rows by their definition, from full passes of trunk and twig without a cache.

Mistakes in the caches of trunk and twig, in masks and positions would change no answer, only cost drafts.
"""

import pytest
import torch

from tests.engine.engines import engine_on, make_runner
from tests.speculation.forests import as_lists
from tests.tiny import IMAGE_TOKEN, prompt
from tests.twigs import LAYERS, grown
from twigvlm.config import SpeculationConfig
from twigvlm.engine.runner import Runner
from twigvlm.kv.cache import KVCache

CHAIN = {"speculate": "chain", "draft_length": 4}
static = pytest.mark.parametrize("static", [False, True], ids=["exact", "static"])


class Watched(Runner):
    """A runner that tells of its drafts: for each step, of each row the answer so far and the tree that is verified.

    Of drafts within the prefill, only how many tokens they have.
    """

    def __init__(self, model, static, speculate, **options):
        super().__init__(model.base, model.twig, SpeculationConfig(speculate, **options), None, 32, static)
        self.steps, self.first = [], {}

    def prefill(self, rows):
        step = super().prefill(rows)
        self.first.update(zip([row.id for row in rows], step.drafted, strict=True))
        return step

    def draft(self):
        draft = super().draft()
        rows = [(row.id, list(row.tokens)) for row in self.rows]
        self.steps.append(list(zip(rows, as_lists(draft.nodes), strict=True)))
        return draft


class Definition:
    """M_s, trunk and twig, on one prompt: each distribution from a full pass."""

    def __init__(self, model, inputs):
        self.model, self.captured, self.known = model, model.base.prompt(**inputs), {}

    @torch.no_grad()
    def run(self, tokens, view=None):
        """States after the prompt and these tokens."""
        base, twig = self.model.base, self.model.twig
        hidden = torch.cat((self.captured.hidden, base.embed(torch.tensor([tokens], dtype=torch.long))), dim=1)
        inputs, masks = base.rotary(hidden, torch.arange(hidden.shape[1])[None]), base.masks()
        return twig(base.run_layers(hidden, 0, twig.config.trunk_layers, inputs, masks, view), inputs, masks, view)

    @torch.no_grad()
    def next(self, tokens):
        """Log-probabilities of the draft vocabulary after these tokens."""
        key = tuple(tokens)
        if key not in self.known:
            self.known[key] = self.model.twig.logits(self.run(list(tokens))[0, -1]).float().log_softmax(dim=-1)
        return self.known[key]

    def best(self, tokens, width):
        """The most probable next tokens with their log-probabilities."""
        ids, best = self.model.twig.draft_token_ids, self.next(tokens).topk(width)
        tokens = best.indices if ids is None else ids[best.indices]
        return list(zip(tokens.tolist(), best.values.tolist(), strict=True))

    def chain(self, answer, length, threshold, ends):
        """Algorithm 1's draft after an answer."""
        draft = []
        while len(draft) < length and (not draft or draft[-1] not in ends):
            ((token, score),) = self.best([*answer, *draft], 1)
            draft.append(token)
            if score < torch.tensor(threshold).log():
                break
        return {tuple(draft[:count]) for count in range(len(draft) + 1)}

    def tree(self, answer, depth, width, expand, nodes, ends):
        """The paths of Algorithm 2's tree after an answer."""
        scores, level = {(): 0.0}, [()]
        for _ in range(depth):
            children = {}
            for path in level:
                for token, score in self.best([*answer, *path], width):
                    children[(*path, token)] = scores[path] + score
            scores.update(children)
            able = [path for path in children if path[-1] not in ends]
            level = sorted(able, key=children.get, reverse=True)[:expand]
        return set(sorted(scores, key=scores.get, reverse=True)[: nodes + 1])


def text_alone(seed):
    inputs = prompt(seed)
    ids = inputs["input_ids"][inputs["input_ids"] != IMAGE_TOKEN][None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# Of each row: its prompt, its pruning and the length of its answer.
ROWS = [
    (prompt(3, 2, 5), {"keep": 5, "final_wipe": 4}, 12),
    (prompt(4, 5, 3), {}, 7),
    (text_alone(5), {}, 10),
]
SHAPES = [
    {"trunk": 2},
    {"trunk": 2, "attention": "eager", "reduced": True},
    {"trunk": 0, "twig": 3, "agreeing": False},
    {"trunk": 1, "twig": 3, "seed": 1},
]


def check_drafts(model, static, ways, expected):
    """Decode all rows together; every draft is the expected one of (definition, answer so far, room, tokens that end it)."""
    ends = set(range(0, 100, 5))
    for inputs, pruning, new in ROWS:
        # They end drafts, but neither prompts nor answers.
        ends -= set(model.generate(**inputs, **pruning, max_new_tokens=new)[0, -new - 1 :].tolist())
    runner = Watched(model, static, **ways)
    engine = engine_on(model, runner)
    rows = {}
    for inputs, pruning, new in ROWS:
        request = engine.add(inputs, **pruning, max_new_tokens=new, eos_token_id=sorted(ends))
        rows[request] = Definition(model, inputs), new
        engine.step()  # the next one joins later
    for _ in engine.stream():
        pass
    assert len({len(step) for step in runner.steps}) > 1
    for step in runner.steps:
        for (request, answer), tree in step:
            definition, new = rows[request]
            assert tree.tokens[0] == answer[-1]
            assert not any(tree.tokens[tree.parents[node]] in ends for node in tree.drafted[1:])
            got = [tree.path_tokens(node) for node in tree.drafted]
            assert len(set(got)) == len(got)
            assert set(got) == expected(definition, answer, new - len(answer) - 1, ends)
    for (request, drafted), (definition, new) in zip(runner.first.items(), rows.values(), strict=True):
        # From the prompt's last token chains are drafted in any case.
        first = runner.policy.behind_prompts(1)
        assert drafted == len(definition.chain([], min(first.depth, new - 1), first.threshold, ends)) - 1, request


@static
@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_chains_by_their_definition(shape, threshold, static):
    def expected(definition, answer, room, ends):
        return definition.chain(answer, min(CHAIN["draft_length"], room), threshold, ends)

    check_drafts(grown(**shape), static, {**CHAIN, "draft_threshold": threshold}, expected)


@static
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [(SHAPES[0], (3, 4, 3, 12)), (SHAPES[1], (3, 4, 3, 6)), (SHAPES[2], (2, 6, 2, 30)), (SHAPES[3], (4, 1, 1, 60))],
)
def test_trees_by_their_definition(shape, sizes, static):
    depth, *others = sizes

    def expected(definition, answer, room, ends):
        return definition.tree(answer, min(depth, room), *others, ends)

    options = dict(zip(("tree_depth", "tree_width", "tree_expand", "tree_nodes"), sizes, strict=True))
    check_drafts(grown(**shape), static, {"speculate": "tree", **options}, expected)


@static
@pytest.mark.parametrize("ways", [{**CHAIN, "draft_threshold": 0.05}, {"speculate": "tree", "tree_nodes": 24}])
def test_caches_hold_what_plain_decoding_holds(ways, static):
    model, new = grown(seed=2), 14
    runner = make_runner(model, static, **ways)
    engine, cache = engine_on(model, runner), runner.batch.cache
    plain = {}
    for inputs, pruning, _ in ROWS:
        alone = engine_on(model, make_runner(model, False))
        alone.add(inputs, **pruning, max_new_tokens=new)
        request = engine.add(inputs, **pruning, max_new_tokens=new)
        plain[request] = alone, Definition(model, inputs)
    moved = 0
    while engine.busy:
        engine.step()
        for place, row in enumerate(engine.active):
            alone, definition = plain[row.id]
            while not alone.active or len(alone.active[0].tokens) < len(row.tokens):
                alone.step()
            assert alone.active[0].tokens == row.tokens
            moved += max(row.accepted, default=0) > 1
            single, held = slice(place, place + 1), row.length + len(row.tokens) - 1
            for layer in range(LAYERS):
                expected = alone.runner.batch.cache.contents(layer, slice(0, 1))
                for before, after in zip(expected, cache.contents(layer, single), strict=True):
                    torch.testing.assert_close(after, before)
            assert cache.held(0, single).lengths.tolist() == [held]
            whole = KVCache(model.twig.last_layer_idx + 1, (model.twig.config.trunk_layers, LAYERS), 1, model.device)
            definition.run(row.tokens[:-1], whole.view(whole.claim(1)))
            for layer in range(*model.twig.cache_layers):
                (seen,) = cache.held(layer, single).lengths
                assert held - 1 <= seen <= held  # the last drafted token may have to enter the twig with the next draft
                for before, after in zip(
                    whole.contents(layer, slice(0, 1)), cache.contents(layer, single), strict=True
                ):
                    torch.testing.assert_close(after, before[:, :, :seen])
    assert moved
