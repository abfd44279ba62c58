"""Every published method by name, end to end: budget, exactness, batches, families, memory, positions."""

from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.batches import batched
from tests.families import IMAGE, LAYERS, TRUNK, TWIG, prompt, tiny
from tests.pruning.references import Alone
from tests.pruning.trunks import grown as grown_tiny
from twigvlm import TwigConfig, TwigVLM
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import average_visual
from twigvlm.pruning.methods import METHODS, make_pruner
from twigvlm.pruning.methods.fastervlm import FasterVLM
from twigvlm.pruning.methods.fitprune import FitPrune
from twigvlm.pruning.methods.pyramiddrop import PyramidDrop
from twigvlm.pruning.methods.visionzip import VisionZip

NAMES = [name for name in METHODS if name != "random"] + ["random:0", "random:2"]
CHAIN = {"speculate": "chain", "draft_length": 3, "draft_threshold": 0.01}
TREE = {"speculate": "tree", "tree_depth": 3, "tree_width": 3, "tree_expand": 2, "tree_nodes": 6}
LONG = {"max_new_tokens": 5}


def pruner_of(name, layers=LAYERS):
    """A method by name; FitPrune has a schedule that might have been calibrated."""
    return FitPrune(tuple(0.9**layer for layer in range(1, layers))) if name == "fitprune" else make_pruner(name)


@cache
def grown(family: str) -> TwigVLM:
    return TwigVLM.grow(tiny(family), TwigConfig(TRUNK, TWIG))


@cache
def inputs_of(family, seed=0):
    return prompt(grown(family).model, family, "images", seed)


def visual(inputs):
    return int((inputs["input_ids"] == IMAGE).sum())


@pytest.mark.parametrize("name", NAMES)
def test_budget_exactness_and_batches(name):
    model, inputs = grown("llava"), inputs_of("llava")
    count, pruning = visual(inputs), {"pruner": pruner_of(name), "retain": 20}
    entered = []

    def note(_layer, args):
        entered.append(args[0].shape[1])

    hooks = [layer.register_forward_pre_hook(note) for layer in model.base.layers]
    output = model.generate(**inputs, **pruning, **LONG, return_dict_in_generate=True)
    for hook in hooks:
        hook.remove()
    text = inputs["input_ids"].shape[1] - count
    average = sum(each - text for each in entered[:LAYERS]) / LAYERS
    assert average == pytest.approx(output.average_visual[0])
    assert abs(average - 20) <= 0.5

    plain = model.generate(**inputs, **LONG)
    assert torch.equal(model.generate(**inputs, pruner=pruner_of(name), retain=count, **LONG), plain)
    for way in (TREE, {"speculate": "auto"}):  # and chains below
        assert torch.equal(model.generate(**inputs, **pruning, **way, **LONG), output.sequences), way

    longer = dict(inputs_of("llava", 1))
    longer["input_ids"] = torch.cat((torch.tensor([[5, 6, 7]]), longer["input_ids"]), dim=1)
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    rows = [inputs, longer]
    batch = batched(rows)
    width = batch["input_ids"].shape[1]
    answers = [model.generate(**row, **pruning, **LONG)[0, row["input_ids"].shape[1] :] for row in rows]
    together = model.generate(**batch, **pruning, **LONG, **CHAIN)[:, width:]
    assert together.tolist() == [answer.tolist() for answer in answers]


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "llava_onevision"])
def test_families(family):
    """Tiles with ends of lines, merged patches in windows, and a tower without a CLS token."""
    model, inputs = grown(family), inputs_of(family)
    count, answers = visual(inputs), set()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for name in NAMES:
        output = model.generate(
            **inputs, pruner=pruner_of(name), retain=0.6 * count, max_new_tokens=2, return_dict_in_generate=True
        )
        assert abs(output.average_visual[0] - 0.6 * count) <= 0.5
        answers.add(tuple(output.kept_indices[0].tolist()))
    assert len(answers) >= len(NAMES) - 4  # DART's, FastV's and others' rankings may agree on a few tokens
    chained = model.generate(**inputs, pruner="sparsevlm", retain=0.6 * count, **CHAIN, **LONG)
    assert torch.equal(chained, model.generate(**inputs, pruner="sparsevlm", retain=0.6 * count, **LONG))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    hooks = [
        each for module in model.model.modules() for each in module._forward_hooks.values()
    ]  # transformers has some
    assert not any(hook.__module__.startswith("twigvlm") for hook in hooks)


def test_several_answers_to_one_picture_and_a_conversation():
    model, inputs = grown("llava"), inputs_of("llava")
    expected = model.generate(**inputs, pruner="visionzip", retain=20, **LONG)
    several = model.generate(**inputs, pruner="visionzip", retain=20, do_sample=True, num_return_sequences=2, **LONG)
    assert len(several) == 2
    engine = model.engine()
    ids = [engine.add(inputs, pruner=name, retain=20, **LONG) for name in ("visionzip", "fastv", "visionzip")]
    answers = {id: [] for id in ids}
    for event in engine.stream():
        answers[event.id] += event.tokens
    assert answers[ids[0]] == answers[ids[2]] == expected[0, inputs["input_ids"].shape[1] :].tolist()


def test_no_twig_is_needed():
    base, inputs = tiny("llava"), inputs_of("llava")
    for name in ("visionzip", "fastv"):
        expected = grown("llava").generate(**inputs, pruner=name, retain=20, **LONG)
        assert torch.equal(TwigVLM.without_twig(base).generate(**inputs, pruner=name, retain=20, **LONG), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pruner": "visionzap", "retain": 9}, "must be one of twig, fastv"),
        ({"pruner": "random", "retain": 9}, "needs the layer"),
        ({"pruner": "cdpruner:3", "retain": 9}, "takes no layer"),
        ({"pruner": "fastv:", "retain": 9}, "nothing follows a colon"),
        ({"pruner": "fastv:compacted", "retain": 9}, "not published with other positions.*leave out compacted"),
        ({"pruner": "fastv:0", "retain": 9}, "must be 1 or more"),
        ({"pruner": "fastv:6", "retain": 9}, "needs a base of more layers than 6"),
        ({"pruner": "visionzip"}, "needs a budget"),
        ({"pruner": make_pruner("dart")}, "needs a budget"),
        ({"pruner": "visionzip", "retain": 33}, "must be 1.0 to 32.0"),
        ({"pruner": "fastv", "retain": 9}, "must be 11.3 to 32.0"),
        ({"pruner": "fastv", "retain": 20, "final_wipe": 5}, "twig's own"),
    ],
)
def test_what_does_not_apply_is_refused(options, words):
    with pytest.raises(TwigVLMError, match=words):
        grown("llava").generate(**inputs_of("llava"), **options, max_new_tokens=1)


def test_bases_that_pool_patches_are_refused_in_one_line():
    model, inputs = grown("gemma3"), inputs_of("gemma3")
    for name in ("visionzip", "mustdrop"):
        words = r"pools patches .*choose a method that does not need that attention .* 'fastv' or 'divprune'$"
        with pytest.raises(TwigVLMError, match=words):
            model.generate(**inputs, pruner=name, retain=20, max_new_tokens=1)
    for name in ("fastv", "divprune"):
        assert model.generate(**inputs, pruner=name, retain=20, max_new_tokens=1).numel()


class Compacted(Alone):
    """Positions are counted again after every cut."""

    def through(self, base, start, stop, cuts):
        for first, last in zip(
            [start, *(cut.layer for cut in cuts)], [*(cut.layer for cut in cuts), stop], strict=True
        ):
            self.positions = torch.arange(len(self.hidden))
            super().through(base, first, last, [])
            for cut in cuts:
                if cut.layer == last:
                    self.keep(cut.keep)

    def keep(self, count):
        raise NotImplementedError


@torch.no_grad()
@pytest.mark.parametrize(
    "pruner", [FasterVLM(positions="compacted"), PyramidDrop(positions="compacted"), VisionZip(positions="compacted")]
)
def test_compacted_positions(pruner):
    """The base's layers on what is left, with positions that begin at 0 after every cut."""
    model, inputs, logits = grown("llava"), inputs_of("llava"), []

    def record(_ids, scores):
        logits.append(scores[0].clone())
        return scores

    choices = []

    class Noting(type(pruner)):
        def choose(self, view, keep):
            choices.append(super().choose(view, keep))
            return choices[-1]

    noting = Noting(**vars(pruner))
    output = model.generate(**inputs, pruner=noting, retain=20, **LONG, logits_processor=[record])
    tokens = output[0, inputs["input_ids"].shape[1] :]
    captured = model.base.prompt(**inputs)
    alone = Compacted(captured.hidden[0], captured.visual_mask[0], torch.arange(captured.hidden.shape[1]))
    new, base = model.base.embed(tokens[None, :-1])[0], model.base
    alone.hidden = torch.cat((alone.hidden, new))
    alone.visual = torch.nn.functional.pad(alone.visual, (0, len(new)))
    pending = list(choices)

    def keep(_count):
        choice = pending.pop(0)
        if choice.hidden is not None:
            prompt_length = choice.stays.shape[1]
            alone.hidden = torch.cat((choice.hidden[0], alone.hidden[prompt_length:]))
        stays = ~alone.visual | torch.nn.functional.pad(choice.stays[0], (0, len(new)))
        alone.hidden, alone.visual = alone.hidden[stays], alone.visual[stays]

    alone.keep = keep
    alone.through(base, 0, LAYERS, noting.cuts(20, visual(inputs), LAYERS))
    torch.testing.assert_close(torch.stack(logits), base.logits(alone.hidden[-len(tokens) :]), rtol=1e-3, atol=1e-3)
    with pytest.raises(TwigVLMError, match="three axes"):
        grown("qwen2_5_vl").generate(**inputs_of("qwen2_5_vl"), pruner=pruner, retain=10, max_new_tokens=1)


PUBLISHED = {
    "fastv": {192: [166], 128: [98], 64: [30]},
    "fastv:3": {192: [152], 128: [82], 64: [11]},
    "pyramiddrop": {192: [322, 180, 101], 128: [242, 101, 43], 64: [110, 21, 4]},
    "sparsevlm": {192: [280, 185, 102], 128: [253, 95, 32], 64: [29, 11, 6]},
    "sparsevlm-v2": {192: [271, 181, 107], 128: [195, 89, 49], 64: [24, 12, 7]},
    "dart": {192: [166], 128: [98], 64: [30]},
    "visionzip": {192: [192], 128: [128], 64: [64]},
    "fastervlm": {192: [192], 128: [128], 64: [64]},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedules_under_the_true_budget(name):
    for retain, sizes in PUBLISHED[name].items():
        cuts = make_pruner(name).cuts(retain, 576, 32)
        assert [cut.keep for cut in cuts] == sizes
        assert abs(average_visual(cuts, 576, 32) - retain) <= 0.5


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random:2"])
@pytest.mark.parametrize(("count", "layers"), [(576, 32), (97, 30), (16, 6)])
def test_every_feasible_budget_is_met(name, count, layers):
    pruner = pruner_of(name, layers)
    for share in (0.999, 0.8, 0.55, 0.45):
        cuts = pruner.cuts(share * count, count, layers)
        assert abs(average_visual(cuts, count, layers) - share * count) <= 0.5
    with pytest.raises(TwigVLMError, match="must be"):
        pruner.cuts(0.1, count, layers)
    with pytest.raises(TwigVLMError, match="must be"):
        pruner.cuts(float("nan"), count, layers)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.elements = max(self.elements, tensor.numel())
        return made


def test_memory_of_a_prefill_is_linear_in_the_visual_tokens():
    """Of 2,916 visual tokens no map is made: no tensor has as many elements as a tenth of one."""
    model = _of_many_tokens()
    count = (216 // 4) ** 2
    ids = torch.cat((torch.full((1, count), 99), torch.randint(2, 99, (1, 8))), dim=1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 216, 216), "attention_mask": torch.ones_like(ids)}
    for name in NAMES:
        share = 0.01 if pruner_of(name).cuts(count, count, 6)[0].layer == 0 else 0.4
        with Largest() as largest:
            model.generate(**inputs, pruner=pruner_of(name), retain=count * share, max_new_tokens=1)
        assert largest.elements < count**2 / 10, name


def _of_many_tokens():
    model = grown_tiny().model
    config = model.config
    config.vision_config.image_size, config.text_config.max_position_embeddings = 216, 4096
    config.image_seq_length = 54**2
    return TwigVLM.grow(type(model)(config).eval(), TwigConfig(2, 2))


def test_position_ids_are_kept_by_default():
    assert all(getattr(pruner_of(name), "positions", "kept") == "kept" for name in NAMES)
