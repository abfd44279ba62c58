"""Messages and pictures become inputs in one way, and what processors and templates refuse is one line."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import IMAGE_TOKEN, VISUAL
from tests.tiny_processor import tiny_processor
from twigvlm.errors import TwigVLMError
from twigvlm.inputs import build_inputs, user_turn

CPU = torch.device("cpu")


def picture(seed, size=(16, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def inputs_of(*conversations, processor=None, **options):
    return build_inputs(processor or tiny_processor(), conversations, CPU, torch.float32, **options)


def refused(*words, conversation=None, processor=None):
    with pytest.raises(TwigVLMError) as caught:
        inputs_of(conversation or [user_turn("What?", picture(0))], processor=processor)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_batch_holds_what_its_conversations_alone_hold():
    answer = {"role": "assistant", "content": "Red."}
    conversations = [
        [user_turn("No picture?")],
        [user_turn("Which are these?", [picture(0), picture(1)])],
        [
            {"role": "system", "content": "Be brief."},
            user_turn("What?", picture(2)),
            answer,
            user_turn("And?", picture(3)),
        ],
    ]
    together, alone = inputs_of(*conversations), [inputs_of(one) for one in conversations]
    assert "pixel_values" not in alone[0]
    assert torch.equal(together["pixel_values"], torch.cat([one["pixel_values"] for one in alone[1:]]))
    for row, mask, one in zip(together["input_ids"], together["attention_mask"], alone, strict=True):
        assert torch.equal(row[mask.bool()], one["input_ids"][0])
        assert mask[-1] == 1
    assert (together["input_ids"] == IMAGE_TOKEN).sum(dim=1).tolist() == [0, 2 * VISUAL, 2 * VISUAL]


def test_a_part_may_name_its_picture_in_any_usual_way(tmp_path):
    picture(0).save(tmp_path / "a.png")
    wanted = inputs_of([user_turn("What?", picture(0))])
    for part in ({"image": picture(0)}, {"path": tmp_path / "a.png"}, {"url": str(tmp_path / "a.png")}):
        given = inputs_of([{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "What?"}]}])
        assert all(torch.equal(given[name], value) for name, value in wanted.items())


def test_the_pixels_have_the_dtype_and_the_ids_keep_theirs():
    inputs = build_inputs(tiny_processor(), [[user_turn("What?", picture(0))]], CPU, torch.bfloat16)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == torch.int64


TEXT_ONLY = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}", ["can only concatenate str"]),
        (TEXT_ONLY, ["writes 0 placeholders '<image>' for 1 images", "choose a vision-language model's template"]),
        ("{{ raise_exception('system\nfirst') }}", ["rejected by the chat template (system first)"]),
        ("{% for %}", ["rejected by the chat template"]),
        (None, ["no chat template", "instruction-tuned"]),
    ],
)
def test_templates_that_are_made_for_other_things(template, words):
    refused(*words, processor=tiny_processor(template))


def test_text_alone_goes_through_a_template_for_text():
    assert inputs_of([{"role": "user", "content": "What?"}], processor=tiny_processor(TEXT_ONLY))


def test_a_conversation_goes_on_after_an_answer_that_contains_a_placeholder():
    answer = "<image> or <image>"
    for content in (answer, [{"type": "text", "text": answer}]):
        asked = [user_turn("Write a tag.", picture(0)), {"role": "assistant", "content": content}, user_turn("Why?")]
        assert int((inputs_of(asked)["input_ids"] == IMAGE_TOKEN).sum()) == VISUAL
        assert asked[1]["content"] == content


def test_placeholders_in_a_text():
    refused("image placeholder '<image>'", "leave it out", conversation=[user_turn("An <image> tag?", picture(0))])
    refused("image placeholder '<image>'", conversation=[user_turn("An <image> tag?")])
    processor = tiny_processor()
    processor.video_token = "<video>"
    refused("video placeholder '<video>'", conversation=[user_turn("A <video> tag?")], processor=processor)
    # Gemma 3's template writes one token, which its processor expands to others
    processor.image_token, processor.tokenizer.image_token = "<start>", "<image>"
    refused("image placeholder '<image>'", conversation=[user_turn("An <image> tag?")], processor=processor)


def test_what_the_processor_refuses(monkeypatch):
    def narrow(self, images, **options):
        raise ValueError("absolute aspect ratio must be\nsmaller than 200")

    processor = tiny_processor()
    monkeypatch.setattr(type(processor.image_processor), "__call__", narrow)
    refused(
        "rejected by the processor (absolute aspect ratio must be smaller than 200)",
        "48x32 pixels",
        conversation=[user_turn("What?", picture(0, (32, 48)))],
        processor=processor,
    )


def test_a_picture_is_measured_before_its_short_side_is_scaled(monkeypatch):
    processor = tiny_processor()
    processor.image_processor.size = {"shortest_edge": 1000}
    monkeypatch.setattr(type(processor.image_processor), "__call__", lambda *_, **__: pytest.fail("scaled"))
    refused(
        "900x10 pixels would be scaled to 90,000,000",
        "crop it",
        conversation=[user_turn("What?", Image.new("RGB", (900, 10)))],
        processor=processor,
    )


@pytest.mark.parametrize("limit", [{"shortest_edge": 1000, "longest_edge": 1500}, {"height": 16, "width": 16}])
def test_sizes_with_an_upper_limit_are_the_processors_own_affair(limit):
    processor = tiny_processor()
    processor.image_processor.size = limit
    inputs_of([user_turn("What?", Image.new("RGB", (30, 20)))], processor=processor)


def test_parts_that_hold_nothing_to_read():
    ask = {"type": "text", "text": "What?"}
    refused("a part of type 'image' is empty", conversation=[{"role": "user", "content": [{"type": "image"}, ask]}])
    clip = {"type": "video", "video": "https://example.org/clip.mp4"}
    refused("'https://example.org/clip.mp4': is a remote", conversation=[{"role": "user", "content": [clip, ask]}])
