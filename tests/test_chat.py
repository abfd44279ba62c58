"""A conversation gives the answers that its turns as one prompt give, and computes what is new alone."""

import base64
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from tests.tiny import prompt, tiny_llava
from tests.tiny_processor import tiny_processor
from twigvlm import TwigConfig, TwigVLM
from twigvlm.errors import TwigVLMError
from twigvlm.images import load_image
from twigvlm.kv.prefix_cache import PrefixCache

WAYS = {
    "none": {},
    "chain": {"speculate": "chain", "draft_threshold": 0.1},
    "tree": {"speculate": "tree", "tree_nodes": 12, "tree_expand": 3},
}
TURNS = [("what is it?", 1), ("and where?", 0), ("what else, here?", 1), ("sure?", 0)]


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def picture(seed):
    pixels = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def grown(pruning_head=False):
    return TwigVLM.grow(
        tiny_llava(2, deep_scale=0.05, from_layer=4, context=600), TwigConfig(2, 2, pruning_head=pruning_head)
    )


@pytest.mark.parametrize("pruning", [{}, {"keep": 4}, {"keep": 3, "final_wipe": 4}], ids=str)
@pytest.mark.parametrize("pruning_head", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_each_answer_is_that_of_the_whole_prompt(way, pruning_head, pruning, processor):
    converse(grown(pruning_head), {**WAYS[way], **pruning, "max_new_tokens": 12}, processor)


@pytest.mark.parametrize("way", ["lookup", "exit"])
def test_so_it_is_with_drafts_that_need_no_twig(way, processor):
    converse(grown(), {"speculate": way, "keep": 4, "max_new_tokens": 12}, processor)


def converse(model, options, processor):
    """Ask in turns, and compare each answer with that to the whole conversation."""
    chat, pictures = model.chat(processor, **options), []
    for question, count in TURNS:
        new = [picture(len(pictures) + number) for number in range(count)]
        pictures += new
        answer = chat.ask(question, images=new)
        whole = chat.messages[:-1]
        text = processor.apply_chat_template(whole, add_generation_prompt=True)
        inputs = processor(images=pictures, text=text, return_tensors="pt")
        expected = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert chat.messages[-1]["content"][0]["text"] == answer
    assert len(chat.messages) == 2 * len(TURNS)


def test_trunk_and_vision_run_on_what_is_new(processor, monkeypatch):
    model = grown()
    chat = model.chat(processor, keep=4, max_new_tokens=4)
    chat.ask("what?", images=[picture(0)])
    seen, seeing = [], []
    model.base.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model.model.model.vision_tower.register_forward_pre_hook(lambda *_: seeing.append(1))
    chat.ask("why?")
    text = processor.apply_chat_template(chat.messages[:1], add_generation_prompt=True)
    first = processor(images=[picture(0)], text=text, return_tensors="pt")["input_ids"].shape[1]
    text = processor.apply_chat_template(chat.messages[:3], add_generation_prompt=True)
    whole = processor(images=[picture(0)], text=text, return_tensors="pt")["input_ids"].shape[1]
    assert seen[0] == whole - first
    assert not seeing
    chat.ask("this?", images=[picture(1)])
    assert seeing


def test_another_picture_in_an_earlier_place_is_seen(processor):
    """As after turns that the caller took out of the conversation: the ids are the same."""
    chat = grown().chat(processor, keep=4, max_new_tokens=8)
    answers = []
    for seed in (0, 1, 0):
        chat.messages = []
        answers.append(chat.ask("what?", images=[picture(seed)]))
    alone = [grown().chat(processor, keep=4, max_new_tokens=8).ask("what?", images=[picture(seed)]) for seed in (0, 1)]
    assert answers == [*alone, alone[0]]
    assert alone[0] != alone[1]


def test_a_disabled_twig_answers_as_the_base_does(processor):
    model = grown()
    chat, alone = (model.chat(processor, max_new_tokens=6) for _ in range(2))
    chat.ask("what?", images=[picture(0)])
    with model.disabled():
        answer = chat.ask("why?")
        alone.ask("what?", images=[picture(0)])
        assert alone.ask("why?") == answer


def test_a_failed_question_leaves_the_conversation_as_it_was(processor):
    chat = grown().chat(processor, max_new_tokens=4)
    first = chat.ask("what?", images=[picture(0)])
    before = list(chat.messages)
    for options, message in (
        ({"keep": 99}, "keep=99"),
        ({"do_sample": True, "num_return_sequences": 2}, "2 answers: a conversation continues with one"),
    ):
        with pytest.raises(TwigVLMError, match=message):
            chat.ask("why?", **options)
        assert chat.messages == before
    again = grown().chat(processor, max_new_tokens=4)
    assert again.ask("what?", images=[picture(0)]) == first
    assert chat.ask("why?") == again.ask("why?")


class Breaking(BaseStreamer):
    """Fails when the answer begins."""

    def put(self, value):
        if value.numel() == 1:
            raise RuntimeError("the line is dead")

    def end(self):
        raise AssertionError


def test_a_question_that_failed_on_its_way_is_forgotten(processor):
    """The same words about another picture are another question."""
    options = {"keep": 4, "max_new_tokens": 6}
    chat = grown().chat(processor, **options)
    with pytest.raises(RuntimeError, match="the line is dead"):
        chat.ask("what?", images=[picture(0)], streamer=Breaking())
    assert chat.messages == []
    expected = grown().chat(processor, **options).ask("what?", images=[picture(1)])
    assert expected != grown().chat(processor, **options).ask("what?", images=[picture(0)])
    assert chat.ask("what?", images=[picture(1)]) == expected


def test_a_conversation_ends_with_the_context(processor):
    chat = grown().chat(processor, max_new_tokens=4)
    chat.ask("what?", images=[picture(0)])
    with pytest.raises(TwigVLMError, match="the base's context only 600"):
        chat.ask("why " * 200)


def test_a_conversation_has_no_padding():
    inputs = {**prompt(), "max_new_tokens": 2, "memory": PrefixCache()}
    inputs["attention_mask"][:, :2] = 0
    with pytest.raises(TwigVLMError, match="attention_mask: hides 2 tokens"):
        grown().generate(**inputs)


def stored(image, kind="PNG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return stored(picture(0), exif=exif)


def transparent():
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (4, 4, 12, 12))
    return stored(image)


def deep():
    return stored(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257))


WAYS_TO_GIVE = {
    "bytes": lambda data, path: data,
    "path": lambda data, path: path,
    "text": lambda data, path: str(path),
    "PIL": lambda data, path: Image.open(path),
    "data URI": lambda data, path: f"data:;base64,{base64.b64encode(data).decode()}",
}


@pytest.mark.parametrize("way", WAYS_TO_GIVE)
@pytest.mark.parametrize("make", [turned, transparent, deep])
def test_pictures_are_read_as_everywhere_else(make, way, processor, tmp_path):
    model, data = grown(), make()
    (tmp_path / "picture.png").write_bytes(data)
    seen = []
    model.model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, named: seen.append(named.get("pixel_values", *args[:1])), with_kwargs=True
    )
    given = WAYS_TO_GIVE[way](data, tmp_path / "picture.png")
    model.chat(processor, max_new_tokens=2).ask("what?", images=given)  # without a list
    model.chat(processor, max_new_tokens=2).ask("what?", images=[given])
    wanted = processor.image_processor(load_image(data), return_tensors="pt")["pixel_values"]
    assert len(seen) == 2
    assert all(torch.equal(pixels, wanted) for pixels in seen)


def test_what_cannot_be_asked_is_one_line_and_changes_nothing(processor, tmp_path):
    chat = grown().chat(processor, max_new_tokens=4)
    chat.ask("what?", images=[picture(0)])
    before = list(chat.messages)
    (tmp_path / "torn.jpg").write_bytes(stored(picture(0), "JPEG")[:400])
    (tmp_path / "two.gif").write_bytes(stored(picture(0), "GIF", save_all=True, append_images=[picture(1)]))
    for question, images, words in (
        ("why?", tmp_path / "torn.jpg", "torn.jpg.*corrupt or truncated"),
        ("why?", [picture(1), str(tmp_path / "none.png")], "none.png': no such file"),
        ("why?", tmp_path / "two.gif", "several frames"),
        ("why?", "https://example.org/cat.jpg", "remote address"),
        ("why?", Image.new("RGB", (3000, 2)), "3000x2 pixels"),
        ("an <image> tag?", (), "image placeholder '<image>'"),
        ("an <image> tag?", picture(1), "image placeholder '<image>'"),
    ):
        with pytest.raises(TwigVLMError, match=words) as caught:
            chat.ask(question, images)
        assert "\n" not in str(caught.value)
        assert chat.messages == before
    assert chat.ask("why?")


def test_a_conversation_with_a_template_for_text_alone(processor):
    plain = tiny_processor("{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}")
    with pytest.raises(TwigVLMError, match="rejected by the chat template"):
        grown().chat(plain, max_new_tokens=4).ask("what?", images=picture(0))
