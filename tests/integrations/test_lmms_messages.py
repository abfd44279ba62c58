"""A task's question: pictures stand where its texts mark them."""

import pytest

from twigvlm.errors import TwigVLMError
from twigvlm.integrations.lmms_eval.messages import to_messages


def text(words):
    return {"type": "text", "text": words}


def given(name):
    """A picture as lmms-eval names it."""
    return {"type": "image", "url": name}


def image(name):
    return {"type": "image", "image": name}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([given("a"), text("What?")], [image("a"), text("What?")]),
        ([given("a"), text("Question: <image>\nWhat?")], [text("Question: "), image("a"), text("\nWhat?")]),
        (
            [given("a"), given("b"), text("<image> or <image>?")],
            [image("a"), text(" or "), image("b"), text("?")],
        ),
        ([given("a"), given("b"), text("<image> Which?")], [image("a"), image("b"), text(" Which?")]),
        ([text("<image> What?")], [text(" What?")]),
        ([text("")], [text("")]),
        (
            [{"type": "video", "url": "v"}, given("a"), text("<image> in it?")],
            [{"type": "video", "video": "v"}, image("a"), text(" in it?")],
        ),
    ],
)
def test_pictures_stand_where_they_are_marked(content, expected):
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [text("That.")]}]
    assert [message["content"] for message in to_messages(messages)] == [expected, [text("That.")]]


@pytest.mark.parametrize("part", [{"type": "audio", "url": "a"}, {"type": "image", "url": {"array": []}}])
def test_other_parts_are_refused(part):
    with pytest.raises(TwigVLMError, match=r"a part of type '(audio|image)': is not supported"):
        to_messages([{"role": "user", "content": [part]}])
