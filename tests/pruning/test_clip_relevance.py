"""CDPruner's relevance by both towers of CLIP, against a plain version that asks the whole CLIP model patch by patch."""

import pytest
import torch
import transformers as hf

from tests.families import IMAGE, prompt, tiny
from tests.tiny_processor import tiny_processor
from twigvlm import TwigVLM
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.methods.cdpruner import CDPruner
from twigvlm.pruning.methods.clip_relevance import ClipRelevance

CONTEXT, START, END = 6, 60, 63


def clip_model(width=32):
    """A random CLIP model; END is the largest token, at which its text tower reads a text."""
    torch.manual_seed(0)
    common = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 16, "vocab_size": END + 1, "max_position_embeddings": CONTEXT, "eos_token_id": 2}
    vision = {"hidden_size": width, "image_size": 16, "patch_size": 4}
    config = hf.CLIPConfig(text_config={**common, **text}, vision_config={**common, **vision}, projection_dim=12)
    return hf.CLIPModel(config).eval()


def clip_tokens(text):
    """What a CLIP tokenizer returns: a token for each character, between two special ones."""
    return {"input_ids": [START, *(1 + ord(character) % 50 for character in text), END]}


class Noting(ClipRelevance):
    def __call__(self, image):
        seen.append((image, super().__call__(image)))
        return seen[-1][1]


seen: list = []


def base_with_tower_of(clip):
    """A LLaVA whose vision tower is that of CLIP."""
    model = tiny("llava")
    weights = {name.removeprefix("vision_model."): each for name, each in clip.vision_model.state_dict().items()}
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    tower.load_state_dict(weights)
    return TwigVLM.without_twig(model)


@torch.no_grad()
@pytest.mark.parametrize(("ending", "asked"), [("", "what is it? B:"), (" B:", "what is it?"), ("", "no")])
def test_relevance_is_that_of_clip(ending, asked):
    clip, tokenizer = clip_model(), tiny_processor().tokenizer
    model, inputs = base_with_tower_of(clip), prompt(tiny("llava"), "llava", "images")
    question = asked + ending
    ids = inputs["input_ids"][0, : int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 1]
    text = torch.tensor(tokenizer(f"\n{question}<|im_end|>")["input_ids"])
    inputs["input_ids"] = torch.cat((ids, text))[None]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    seen.clear()
    options = {"retain": 12, "max_new_tokens": 1, "return_dict_in_generate": True}
    pruner = CDPruner(relevance=Noting(clip, clip_tokens, tokenizer, ending))
    output = model.generate(**inputs, pruner=pruner, **options)
    plain = model.generate(**inputs, pruner="cdpruner", **options)
    assert len(seen) == 2
    assert output.kept_indices[0].tolist() != plain.kept_indices[0].tolist()

    tokens = clip_tokens(asked)["input_ids"]
    segments = [tokens[start : start + CONTEXT] for start in range(0, len(tokens), CONTEXT)]
    segments[-1] += [0] * (CONTEXT - len(segments[-1]))
    assert len(segments) == (1 if asked == "no" else 3)
    pixels = inputs["pixel_values"]
    texts = clip(input_ids=torch.tensor(segments), pixel_values=pixels).text_embeds
    patches = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    for number, (image, relevance) in enumerate(seen):
        assert image.question_ids.tolist() == text.tolist()
        for j, got in enumerate(relevance):
            patch = clip.visual_projection(clip.vision_model.post_layernorm(patches[number, j]))
            cosines = [float(torch.cosine_similarity(patch, each, dim=0)) for each in texts]
            assert float(got) == pytest.approx(-sum(cosines) / len(cosines), abs=1e-5)


def test_another_clip_is_refused():
    model, inputs = TwigVLM.without_twig(tiny("llava")), prompt(tiny("llava"), "llava", "images")
    pruner = CDPruner(relevance=ClipRelevance(clip_model(width=40), clip_tokens, tiny_processor().tokenizer))
    with pytest.raises(TwigVLMError, match=r"relevance: this CLIP has 40 values for a patch.*; choose the CLIP whose"):
        model.generate(**inputs, pruner=pruner, retain=12, max_new_tokens=1)
