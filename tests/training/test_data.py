import json
from collections import Counter

import datasets
import pytest
import torch
from PIL import Image

from tests.tiny import IMAGE_TOKEN, VISUAL
from tests.tiny_processor import CHAT_TEMPLATE, END, tiny_processor
from twigvlm.errors import TwigVLMError
from twigvlm.training.data import (
    IGNORE,
    Collator,
    ConversationDataset,
    frequent_answer_tokens,
    load_samples,
    to_messages,
)


def answers(item, processor):
    """The labelled stretches of a sample, as text."""
    labels = item["labels"][0]
    stretches, current = [], []
    for label in [*labels.tolist(), IGNORE]:
        if label != IGNORE:
            current.append(label)
        elif current:
            stretches.append(processor.tokenizer.decode(current))
            current = []
    return stretches


def test_labels_are_exactly_the_answers_with_their_end_tokens(dataset, processor):
    one, two = dataset[0], dataset[1]
    assert answers(one, processor) == [f"It is red.{END}"]
    assert answers(two, processor) == [f"It is green.{END}", f"Yes.{END}"]
    for item in (one, two):
        labelled = item["labels"] != IGNORE
        assert torch.equal(item["labels"][labelled], item["input_ids"][labelled])
        assert int((item["input_ids"] == IMAGE_TOKEN).sum()) == VISUAL


def test_prompt_part_is_what_generation_sees(dataset, samples, processor):
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    prompt = processor(images=samples[0]["image"], text=text, return_tensors="pt")["input_ids"]
    item = dataset[0]
    length = prompt.shape[1]
    assert torch.equal(item["input_ids"][:, :length], prompt)
    assert (item["labels"][0, :length] == IGNORE).all()
    assert item["labels"][0, length] != IGNORE


def test_an_end_token_is_added_where_the_template_has_none(samples):
    bare = tiny_processor(CHAT_TEMPLATE.replace("<|im_end|>", ""))
    item = ConversationDataset(samples, bare)[0]
    assert answers(item, bare) == [f"It is red.{END}"]


def test_a_template_that_rewrites_history_is_refused(samples):
    odd = tiny_processor("{{ messages | length }}" + CHAT_TEMPLATE)
    with pytest.raises(TwigVLMError, match="rewrites earlier turns"):
        ConversationDataset(samples, odd)[1]


def test_image_after_the_question_keeps_its_place():
    sample = {
        "image": "x",
        "conversations": [{"from": "human", "value": "Why?\n<image>"}, {"from": "gpt", "value": "So."}],
    }
    assert to_messages(sample, "sample 0")[0]["content"] == [{"type": "text", "text": "Why?"}, {"type": "image"}]


def test_long_samples_are_cut_and_never_silently_emptied(samples, processor):
    whole = ConversationDataset(samples, processor)[0]
    length = whole["input_ids"].shape[1]
    cut = ConversationDataset(samples, processor, length - 3)[0]
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, :-3])
    assert torch.equal(cut["labels"], whole["labels"][:, :-3])
    assert torch.equal(cut["pixel_values"], whole["pixel_values"])
    with pytest.raises(TwigVLMError, match=r"sample 's0': no answer within the first 20 tokens"):
        ConversationDataset(samples, processor, 20)[0]


def test_collator_pads_on_the_right(dataset):
    batch = Collator(pad_token_id=0)([dataset[0], dataset[1]])
    short, long = dataset[0]["input_ids"].shape[1], dataset[1]["input_ids"].shape[1]
    assert short < long
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, long)
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["attention_mask"].sum(1).tolist() == [short, long]
    assert (batch["input_ids"][0, short:] == 0).all()
    assert (batch["labels"][0, short:] == IGNORE).all()


def test_hugging_face_datasets_are_taken(samples, dataset, processor):
    table = datasets.Dataset.from_dict({key: [sample[key] for sample in samples] for key in samples[0]})
    item = ConversationDataset(table, processor)[1]
    assert torch.equal(item["input_ids"], dataset[1]["input_ids"])
    assert torch.equal(item["pixel_values"], dataset[1]["pixel_values"])


@pytest.fixture
def files(tmp_path, samples):
    """The samples on disk: images in `pictures`, conversations not yet written."""
    (tmp_path / "pictures").mkdir()
    for sample in samples:
        name = f"pictures/{sample['id']}.png"
        sample["image"].save(tmp_path / name)
        sample["image"] = name
    return tmp_path


def test_file_and_directory(files, samples, processor):
    (files / "a.json").write_text(json.dumps(samples[:5]))
    (files / "b.jsonl").write_text("\n".join(json.dumps(sample) for sample in samples[5:]) + "\n")
    assert [sample["id"] for sample in load_samples(files)] == [f"s{number}" for number in range(8)]
    loaded = load_samples(files / "a.json")
    assert len(loaded) == 5
    assert answers(ConversationDataset(loaded, processor)[0], processor) == [f"It is red.{END}"]
    elsewhere = files / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "c.json").write_text(json.dumps(samples))
    assert load_samples(elsewhere / "c.json", images=files)[0]["image"] == loaded[0]["image"]


def test_bad_files(files, samples):
    def refused(words, **options):
        with pytest.raises(TwigVLMError, match=words) as caught:
            load_samples(files / "a.json", **options)
        assert "\n" not in str(caught.value)

    refused("no such file or directory")
    (files / "a.json").write_text('[{"id":')
    refused("not readable as JSON")
    (files / "a.json").write_bytes(b"\xff\xfe\x00")
    refused("not readable as JSON")
    (files / "a.json").write_text('{"id": 3}')
    refused("put the samples in a list")
    (files / "a.json").write_text("[]")
    refused("holds no samples")
    (files / "a.json").write_text(json.dumps(samples))
    refused("no such directory", images=files / "none")
    (files / "pictures" / "s3.png").unlink()
    refused(r"sample 's3': no image file .*s3\.png")
    with pytest.raises(TwigVLMError, match=r"no \.json or .jsonl file"):
        load_samples(files / "pictures")


def say(*turns):
    return [{"from": speaker, "value": value} for speaker, value in turns]


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
        ({"conversations": say(("human", "What?"), ANSWER)}, "holds 0 times '<image>'; put one"),
        ({"conversations": say(("human", "<image><image>What?"), ANSWER)}, "holds 2 times '<image>'"),
        ({"conversations": say(QUESTION, ("gpt", "<image> is it"))}, "turn 1 holds 1 times '<image>'; only the first"),
        ({"image": None}, "has no image"),
    ],
)
def test_bad_samples_are_named(change, words):
    sample = {"id": "abc", "image": "a.png", "conversations": say(QUESTION, ANSWER), **change}
    with pytest.raises(TwigVLMError, match=words) as caught:
        to_messages(sample, "sample 'abc'")
    assert str(caught.value).startswith("sample 'abc': ")


def test_samples_without_id_are_named_by_index(processor):
    with pytest.raises(TwigVLMError, match="sample 1: has no list of turns"):
        ConversationDataset([{}, {}], processor)[1]


def test_broken_image_names_the_sample(files, samples, processor):
    (files / "pictures" / "s0.png").write_bytes(b"nothing")
    samples[0]["image"] = str(files / "pictures" / "s0.png")
    with pytest.raises(TwigVLMError, match=r"sample 's0': image .*not an image"):
        ConversationDataset(samples, processor)[0]


def test_frequent_answer_tokens(samples, processor):
    tokenizer = processor.tokenizer
    texts = [turn["value"] for sample in samples for turn in sample["conversations"] if turn["from"] == "gpt"]
    counts = Counter("".join(texts))  # one token per character
    few = frequent_answer_tokens(samples, processor, 2)
    assert set(tokenizer.convert_ids_to_tokens(few.tolist())) == {character for character, _ in counts.most_common(2)}
    used = set(tokenizer(f"Itis redgreenbluewhiteYes.{END}")["input_ids"])
    most = frequent_answer_tokens(samples, processor, len(used) + 3)
    assert used < set(most.tolist())
    assert most.tolist() == sorted(set(most.tolist()))
    with pytest.raises(TwigVLMError, match="draft_vocabulary=1000: at most 100"):
        frequent_answer_tokens(samples, processor, 1000)


def test_grey_pictures_become_rgb(samples, processor):
    samples[0]["image"] = Image.new("L", (20, 20), 100)
    assert ConversationDataset(samples, processor)[0]["pixel_values"].shape == (1, 3, 16, 16)
