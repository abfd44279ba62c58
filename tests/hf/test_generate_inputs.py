"""`generate` takes prompts in several forms, and no memory in advance for answers that may get long."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.batches import batched
from tests.tiny import IMAGE_TOKEN, prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM, TwigVLMError


def test_a_prompt_that_ends_with_an_image_is_not_pruned(model):
    inputs = prompt()
    end = int((inputs["input_ids"][0] == IMAGE_TOKEN).nonzero().max()) + 1
    cut = {**inputs, "input_ids": inputs["input_ids"][:, :end], "attention_mask": inputs["attention_mask"][:, :end]}
    assert model.generate(**cut, max_new_tokens=2).tolist() == model.model.generate(**cut, max_new_tokens=2).tolist()
    with pytest.raises(TwigVLMError, match="the prompt ends with a visual token"):
        model.generate(**cut, max_new_tokens=2, keep=4)


def test_pixels_of_none_are_those_of_a_prompt_of_text(model):
    text = prompt()["input_ids"][:, -6:]
    expected = model.generate(text, max_new_tokens=5)
    assert torch.equal(model.generate(text, pixel_values=None, max_new_tokens=5), expected)


def test_ids_as_the_first_argument(model):
    inputs = prompt()
    expected = model.generate(**inputs, max_new_tokens=5)
    assert torch.equal(model.generate(inputs.pop("input_ids"), **inputs, max_new_tokens=5), expected)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_shorter_answers_are_padded_as_the_base_pads_them(model, monkeypatch, kind):
    """Without a padding token the base takes the first end token; id 0 could be any word."""
    inputs = batched([prompt(1), prompt(2)])
    width = inputs["input_ids"].shape[1]
    answer = model.generate(**inputs, max_new_tokens=8)[0, width:].tolist()
    monkeypatch.setattr(model.model.generation_config, "pad_token_id", None)
    options = {"max_new_tokens": 8, "eos_token_id": kind([answer[3], answer[2]]), "do_sample": False}
    with model.disabled():
        expected = model.generate(**inputs, **options)
    assert expected.shape[1] > width + 4, "one answer is shorter"
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_without_an_attention_mask(model):
    inputs = prompt()
    expected = model.generate(**inputs, max_new_tokens=5)
    del inputs["attention_mask"]
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), expected)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that is made within this context."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, torch.Tensor):
                self.size = max(self.size, made.numel())
        return result


@pytest.mark.parametrize("speculation", [{}, {"speculate": "chain", "draft_threshold": 0.0}, {"speculate": "tree"}])
def test_a_large_max_new_tokens_takes_no_memory_in_advance(model, speculation):
    inputs = batched([prompt(1), prompt(2, 5, 3)])
    width = inputs["input_ids"].shape[1]
    ends = model.generate(**inputs, max_new_tokens=6)[:, width + 2 :].flatten().tolist()
    answers, sizes = [], []
    for most in (1000, 2**31 - 1):
        with LargestTensor() as largest:
            answers.append(model.generate(**inputs, **speculation, max_new_tokens=most, eos_token_id=ends).tolist())
        sizes.append(largest.size)
    assert answers[0] == answers[1]
    assert len(answers[0][0]) <= width + 6
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("way", [{}, {"speculate": "chain", "draft_threshold": 0.0}])
def test_a_batch_with_a_prompt_of_text_alone_is_shown_once_per_position(way):
    """Pruning does not part rows that a caller's processor sees together."""
    model = TwigVLM.grow(tiny_llava(), TwigConfig(2, 2))
    with_image = prompt(0)
    text = {"input_ids": with_image["input_ids"][:, -6:], "attention_mask": with_image["attention_mask"][:, -6:]}
    batch = batched([with_image, text])
    shapes = []

    def watch(ids, scores):
        shapes.append(tuple(ids.shape))
        return scores

    output = model.generate(**batch, keep=5, max_new_tokens=6, logits_processor=[watch], **way)
    start = batch["input_ids"].shape[1]
    assert shapes == [(2, start + position) for position in range(6)]
    for row, alone in zip(output, (with_image, text), strict=True):
        expected = model.generate(**alone, **({"keep": 5} if "pixel_values" in alone else {}), max_new_tokens=6)
        assert row[start:].tolist() == expected[0, alone["input_ids"].shape[1] :].tolist()
