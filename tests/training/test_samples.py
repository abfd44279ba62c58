import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from twigvlm.training.data.samples import BrokenSample, to_messages


def say(*turns):
    return [{"from": speaker, "value": value} for speaker, value in turns]


def chat(content):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "That."}]


QUESTION, ANSWER = ("human", "<image>\nWhat?"), ("gpt", "That.")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conversations": None}, "no list of turns"),
        ({"conversations": []}, "no list of turns"),
        ({"conversations": "text"}, "no list of turns"),
        ({"conversations": ["text"]}, "turn 0 is from None"),
        ({"conversations": say(ANSWER)}, "turn 0 is from 'gpt', expected 'human'"),
        ({"conversations": say(QUESTION, ("human", "And?"))}, "turn 1 is from 'human', expected 'gpt'"),
        ({"conversations": say(("robot", "<image>x"))}, "turn 0 is from 'robot'"),
        ({"conversations": say(QUESTION)}, "ends with a question"),
        ({"conversations": say(QUESTION, ("gpt", " "))}, "turn 1 has no text"),
        ({"conversations": say(QUESTION, ("gpt", 7))}, "turn 1 has no text"),
        ({"conversations": say(("human", "<image>\n"), ANSWER)}, "turn 0 has no text"),
        (
            {"conversations": say(("human", "What?"), ANSWER)},
            "images without a place in the questions: 1; put '<image>' there",
        ),
        ({"conversations": say(("human", "<image><image>What?"), ANSWER)}, "turn 0 holds more places for images"),
        ({"conversations": say(QUESTION, ("gpt", "<image> is it"))}, "turn 1 holds an image or '<image>'"),
        ({"conversations": say(QUESTION, ("system", "Be brief."))}, "turn 1 is from 'system', expected 'gpt'"),
        ({"image": None}, "turn 0 holds more places for images"),
        ({"image": ""}, "turn 0 holds more places for images"),
        ({"image": ["a.png", "b.png"]}, "images without a place in the questions: 1; put '<image>' there"),
        ({"image": 7}, "turn 0 has an image that is int"),
        ({"image": {"bytes": None, "path": None}}, "turn 0 has an image that is NoneType"),
        ({"video": "a.mp4"}, "holds video or audio"),
        ({"messages": []}, "no list of turns"),
        ({"messages": chat([{"type": "video"}])}, "turn 0 holds a part of type 'video'"),
        ({"messages": chat([{"type": "text", "text": None}])}, "turn 0 holds a part of type 'text'"),
        ({"messages": chat(["What?"])}, "turn 0 holds a part of type None"),
        ({"messages": chat(None)}, "turn 0 has no text under 'content'"),
        ({"messages": chat("<image><image>What?")}, "turn 0 holds more places"),
    ],
)
def test_bad_samples_are_named(change, words):
    sample = {"id": "abc", "image": "a.png", "conversations": say(QUESTION, ANSWER), **change}
    with pytest.raises(BrokenSample, match=words) as caught:
        to_messages(sample, "abc")
    assert str(caught.value).startswith("sample 'abc': ")


RED = Image.new("RGB", (4, 4), "red")
IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    "sample",
    [
        {"conversations": say(("human", "Why?\n<image>\nSay!"), ANSWER, ("human", "<image>\nSure?"), ANSWER),
         "image": ["a", RED]},
        {"messages": [
            {"role": "user", "content": "Why? <image> Say!"}, {"role": "assistant", "content": "That."},
            {"role": "user", "content": [{"type": "image", "text": None}, text("Sure?")]},
            {"role": "assistant", "content": [text("That. ")]}],
         "images": ["a", RED], "image": None},
        {"messages": [
            {"role": "user", "content": [text("Why?"), {**IMAGE, "path": "a"}, text("Say!")]},
            {"role": "assistant", "content": "That."},
            {"role": "user", "content": [{**IMAGE, "image": RED}, text("Sure?")]}, {"role": "assistant", "content": "That."}]},
        {"messages": [
            {"role": "user", "content": [text("Why?"), {**IMAGE, "image": {"bytes": None, "path": "a"}}, text("Say!")]},
            {"role": "assistant", "content": "That."},
            {"role": "user", "content": [IMAGE, text("Sure?")]}, {"role": "assistant", "content": "That."}],
         "images": [RED]},
    ],
)  # fmt: skip
def test_every_kind_becomes_the_same(sample, tmp_path):
    wanted = [
        {"role": "user", "content": [text("Why?"), IMAGE, text("Say!")]},
        {"role": "assistant", "content": [text("That.")]},
        {"role": "user", "content": [IMAGE, text("Sure?")]},
        {"role": "assistant", "content": [text("That.")]},
    ]
    assert to_messages(sample, 7) == {"id": 7, "messages": wanted, "images": ["a", RED]}
    assert to_messages(sample, 7, tmp_path)["images"] == [str(tmp_path / "a"), RED]


words = st.text("ab \n", min_size=1).filter(str.strip)
questions = (
    st.lists(st.one_of(words, st.just("<image>")), min_size=1)
    .map("".join)
    .filter(lambda value: value.replace("<image>", "").strip())
)


@given(st.lists(st.tuples(questions, words), min_size=1, max_size=4), st.sampled_from([None, "Be brief."]))
def test_nothing_is_lost_and_the_form_is_stable(exchanges, system):
    turns = [] if system is None else [("system", system)]
    turns += [turn for question, answer in exchanges for turn in (("human", question), ("gpt", answer))]
    count = "".join(value for _, value in turns).count("<image>")
    images = [f"{number}.png" for number in range(count)]
    sample = to_messages({"conversations": say(*turns), "images": images}, "x")
    assert sample["images"] == images
    assert to_messages(sample, "x") == sample
    for message, (_, value) in zip(sample["messages"], turns, strict=True):
        parts = [part.get("text", "<image>") for part in message["content"]]
        assert "".join("".join(parts).split()) == "".join(value.split())


@pytest.mark.parametrize(
    "beside", [{"image": ""}, {"image": None}, {"images": [None]}, {"images": [""], "image": ""}], ids=str
)
def test_tables_have_empty_names_in_rows_without_a_picture(beside):
    assert to_messages({"conversations": say(("human", "What?"), ANSWER), **beside}, 0)["images"] == []


def test_an_empty_list_of_images_hides_no_image():
    sample = {"conversations": say(QUESTION, ANSWER), "images": [], "image": "a.png"}
    assert to_messages(sample, 0)["images"] == ["a.png"]


def test_the_sample_is_left_as_it_was():
    part = {"type": "image", "image": RED}
    to_messages({"messages": chat([part, text("What?")])}, 0)
    assert part == {"type": "image", "image": RED}
