"""Bad input is refused in one line that names the value and the remedy; nothing is silently dropped."""

import pytest
import torch
from transformers import DynamicCache

from tests.tiny import IMAGE_TOKEN, prompt, tiny_llava
from twigvlm import PruningConfig, SpeculationConfig, TwigConfig, TwigVLM, TwigVLMError
from twigvlm.pruning.methods.random import RandomScores


@pytest.fixture(scope="module")
def model():
    return TwigVLM.grow(tiny_llava(), TwigConfig(2, 2, final_wipe=5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be 1 or more"),
        ({"max_new_tokens": -3}, "max_new_tokens=-3"),
        ({"retain": 1.0}, r"retain=1: must be 5\.8 to 13\.3 for 16 visual tokens"),
        ({"retain": 14.0}, "retain=14: must be"),
        ({"retain": 8.0, "keep": 3}, "retain=8 and keep=3: give only one of them"),
        ({"keep": 0}, "keep=0: must be 1 to 16"),
        ({"keep": 17}, "keep=17: must be 1 to 16"),
        ({"max_new_tokens": 4.5}, r"max_new_tokens=4\.5: must be a whole number"),
        ({"keep": 4, "scorer": lambda trunk: None}, "scorer: returned NoneType"),
        ({"keep": 4, "scorer": lambda trunk: [1.0], "scout": True}, "scorer: returned list"),
        ({"keep": 4, "scorer": lambda trunk: torch.zeros(3), "scout": True}, r"scorer: returned \(3,\)"),
        ({"keep": 4, "scorer": lambda trunk: torch.zeros(3)}, r"scorer: returned \(3,\); return .* \(1, 25\)"),
        ({"input_ids": [[1, 2]]}, "input_ids: is list"),
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids: is \(2,\)"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"input_ids: is \(1, 0\)"),
        ({"keep": 4, "final_wipe": 2}, "final_wipe=2: must be 3 to 6"),
        ({"keep": 4, "final_wipe": 7}, "final_wipe=7: must be 3 to 6"),
        ({"final_wipe": 4}, "final_wipe=4: needs a budget"),
        ({"final_share": 0.5}, r"final_share=0\.5: needs a budget"),
        ({"keep": 4, "final_share": 1.5}, r"final_share=1\.5: must be 0 to 1"),
        ({"keep": 4, "scout": True, "final_share": 0.5}, r"scout and final_share=0\.5: give only one of them"),
        ({"keep": 4, "final_wipe": 6, "final_share": 0.5}, r"final_share=0\.5: needs a layer after which tokens leave"),
        ({"retain_per_image": True}, "retain_per_image=True: needs a budget"),
        ({"scorer": RandomScores()}, "scorer: needs a budget"),
        ({"speculate": "beam"}, "speculate='beam': must be one of none, chain, tree"),
        (
            {"attention_mask": torch.tensor([[1] * 23 + [0, 0]])},
            "attention_mask: hides tokens after others; pad on the left",
        ),
        ({"attention_mask": torch.zeros(1, 25)}, "attention_mask: hides a whole prompt"),
        ({"draft_length": 0}, "draft_length=0: must be 1 or more"),
        ({"tree_depth": 0}, "tree_depth=0: must be 1 or more"),
        ({"tree_width": 0}, "tree_width=0: must be 1 or more"),
        ({"tree_expand": 0}, "tree_expand=0: must be 1 or more"),
        ({"tree_nodes": 0}, "tree_nodes=0: must be 1 or more"),
        ({"draft_threshold": 1.5}, r"draft_threshold=1\.5: must be 0 to 1"),
        ({"generator": torch.Generator()}, "generator: has no effect on greedy decoding"),
        ({"num_beams": 3}, "num_beams=3: beam search is not supported"),
        ({"prompt_lookup_num_tokens": 3}, "^prompt_lookup_num_tokens=3: asks for assisted_generation, but only greedy"),
        ({"penalty_alpha": 0.5, "top_k": 4}, r"^penalty_alpha=0\.5: asks for contrastive_search, but only greedy"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True is not supported"),
        ({"output_attentions": True}, "output_attentions=True is not supported"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged'"),
        ({"token_healing": True}, "token_healing=True is not supported"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size=4 is not supported"),
        (
            {"vision_feature_layer": -1, "pruner": "visionzip", "retain": 8},
            "vision_feature_layer=-1: this pruner looks at layer -2",
        ),
        ({"synced_gpus": True}, "synced_gpus=True is not supported"),
        ({"past_key_values": DynamicCache()}, "past_key_values is not supported"),
        ({"retian": 64}, "retian"),
        ({"stop_strings": ["x"]}, "stop_strings: needs the tokenizer"),
        ({"assistant_model": object()}, "assistant_model is not supported"),
        ({"max_length": 3}, "max_length"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_options(model, options, message):
    with pytest.raises(TwigVLMError, match=message) as caught:
        model.generate(**{**prompt(), **({} if "max_length" in options else {"max_new_tokens": 5}), **options})
    assert "\n" not in str(caught.value)


def test_padding_on_the_right_is_found_without_a_mask(model):
    """Hugging Face's `generate` makes a mask of the padding tokens."""
    inputs = prompt()
    padded = torch.nn.functional.pad(inputs["input_ids"], (0, 3))
    with pytest.raises(TwigVLMError, match="hides tokens after others"):
        model.generate(**{**inputs, "input_ids": padded, "attention_mask": None}, pad_token_id=0, max_new_tokens=2)


@pytest.mark.parametrize("option", [{"keep": 3}, {"scorer": RandomScores()}])
def test_what_a_disabled_twig_would_drop_is_refused(model, option):
    with model.disabled(), pytest.raises(TwigVLMError, match="do not apply while the twig is disabled"):
        model.generate(**prompt(), max_new_tokens=2, **option)


def test_trees_need_masks(model, monkeypatch):
    monkeypatch.setattr(model.base.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(TwigVLMError, match="speculate='tree': 'flash_attention_2' takes no mask"):
        model.generate(**prompt(), speculate="tree", max_new_tokens=5)


def test_prompts(model):
    inputs = prompt()
    ids = inputs["input_ids"]
    with pytest.raises(TwigVLMError, match="No image placeholder"):
        model.generate(ids[ids != IMAGE_TOKEN][None], pixel_values=inputs["pixel_values"], max_new_tokens=5)
    with pytest.raises(TwigVLMError, match="16 image placeholders but no image"):
        model.generate(ids, max_new_tokens=5)
    with pytest.raises(TwigVLMError, match="do not match"):
        model.generate(ids, pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1), max_new_tokens=5)
    with pytest.raises(TwigVLMError, match="do not match"):
        model.generate(ids.repeat(2, 1), pixel_values=inputs["pixel_values"], max_new_tokens=5)
    with pytest.raises(TwigVLMError, match="input_ids is missing"):
        model.generate(pixel_values=inputs["pixel_values"], max_new_tokens=5)
    with pytest.raises(TwigVLMError, match="give only one of them"):
        model.generate(ids, **inputs, max_new_tokens=5)
    with pytest.raises(TwigVLMError, match="135 tokens, the base's context only 128"):
        model.generate(**prompt(after=116), max_new_tokens=5)


def test_pixels_that_do_not_fit_the_placeholders(model):
    inputs = prompt()
    ids = torch.cat((inputs["input_ids"], torch.tensor([[IMAGE_TOKEN]])), dim=1)
    with pytest.raises(TwigVLMError, match="do not match"):
        model.generate(ids, pixel_values=inputs["pixel_values"], max_new_tokens=5)


def test_a_generator_does_not_apply_while_disabled(model):
    with model.disabled(), pytest.raises(TwigVLMError, match="generator: the base's own generate takes none"):
        model.generate(**prompt(), do_sample=True, generator=torch.Generator(), max_new_tokens=5)


def test_pruning_does_not_apply_while_disabled(model):
    for options in ({"retain": 8.0}, {"keep": 3}, {"speculate": "chain"}, {"speculate": "tree"}):
        with model.disabled(), pytest.raises(TwigVLMError, match="do not apply while the twig is disabled"):
            model.generate(**prompt(), **options, max_new_tokens=5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwigConfig(trunk_layers=-1), "trunk_layers=-1: must be 0 or more"),
        (lambda: TwigConfig(twig_layers=0), "twig_layers=0: must be 1 or more"),
        (lambda: TwigConfig(draft_vocabulary=0), "draft_vocabulary=0: must be 1 or more"),
        (lambda: TwigConfig(final_wipe=2), "final_wipe=2: must be 3 or more"),
        (lambda: TwigConfig(final_share=-0.5), r"final_share=-0\.5: must be 0 to 1"),
        (lambda: TwigConfig(final_share=0.5), r"final_share=0\.5: .* give final_wipe too"),
        (lambda: TwigConfig(init="first"), "init='first': must be one of next, last, random"),
        (lambda: TwigConfig(head="none"), "head='none': must be one of own, shared"),
        (lambda: SpeculationConfig(speculate="greedy"), "speculate='greedy'"),
        (lambda: PruningConfig(final_wipe=3), "final_wipe=3: needs a budget"),
        (lambda: PruningConfig(keep="4"), "keep='4': must be a whole number"),
        (lambda: PruningConfig(keep=4.6), r"keep=4\.6: must be a whole number"),
        (lambda: PruningConfig(keep=True), "keep=True: must be a whole number"),
        (lambda: PruningConfig(retain="4"), "retain='4': must be a number"),
        (lambda: SpeculationConfig("chain", draft_length=2.5), r"draft_length=2\.5: must be a whole number"),
    ],
)
def test_configs(make, message):
    with pytest.raises(TwigVLMError, match=message):
        make()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_scorer_may_be_of_any_kind(model, share):
    """It is no key of a dictionary unless requests share a prefix."""

    class Scorer:
        __hash__ = None

        def __call__(self, trunk):
            return -torch.arange(trunk.tokens.hidden.shape[1]).float().expand(trunk.tokens.hidden.shape[:2])

    output = model.generate(
        **prompt(), keep=4, final_share=share, scorer=Scorer(), max_new_tokens=3, return_dict_in_generate=True
    )
    first = model.base.visual_mask(prompt()["input_ids"])[0].nonzero()[:4, 0]
    assert torch.equal(output.kept_indices[0], first)
