"""What samples become: prompts labelled where the answers are, batches of them, and the tokens that answers use most."""

from collections import Counter

import datasets
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing

from tests.tiny import IMAGE_TOKEN, VISUAL, tiny_llava
from tests.tiny_processor import CHAT_TEMPLATE, END, START, tiny_processor
from tests.training.conversations import BLUE, RED, ask
from twigvlm import TwigVLM
from twigvlm.base.vlm import BaseVLM
from twigvlm.cli.session import build_inputs
from twigvlm.errors import TwigVLMError
from twigvlm.training.data.dataset import IGNORE, Collator, ConversationDataset, frequent_answer_tokens


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


def test_a_template_that_begins_with_the_first_token_gets_no_second(samples):
    processor = tiny_processor()
    tokenizer = processor.tokenizer
    tokenizer.bos_token = START
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, tokenizer.bos_token_id)]
    )
    content = [{"type": "image", "image": samples[0]["image"]}, {"type": "text", "text": "What colour?"}]
    wanted = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )["input_ids"]
    assert wanted[0, :2].tolist() != [tokenizer.bos_token_id] * 2
    trained = ConversationDataset(samples, processor, strict=True)[0]["input_ids"]
    assert torch.equal(trained[:, : wanted.shape[1]], wanted)
    base = tiny_llava()
    asked = build_inputs(base, processor, [samples[0]["image"]], ["What colour?"])["input_ids"]
    assert torch.equal(asked, wanted)
    model, seen = TwigVLM.grow(base), []
    model.base.prompt = lambda **inputs: seen.append(inputs["input_ids"]) or BaseVLM.prompt(model.base, **inputs)
    model.chat(processor, max_new_tokens=1).ask("What colour?", images=[samples[0]["image"]])
    assert torch.equal(seen[0], wanted)


def test_an_end_token_is_added_where_the_template_has_none(samples):
    bare = tiny_processor(CHAT_TEMPLATE.replace("<|im_end|>", ""))
    item = ConversationDataset(samples, bare)[0]
    assert answers(item, bare) == [f"It is red.{END}"]
    assert answers(ConversationDataset(samples, bare)[1], bare) == ["It is green.", f"Yes.{END}"]


def test_a_template_that_rewrites_history_is_refused(samples):
    odd = tiny_processor("{{ messages | length }}" + CHAT_TEMPLATE)
    with pytest.raises(TwigVLMError, match="rewrites earlier turns"):
        ConversationDataset(samples, odd)[1]


def test_long_samples_are_cut_and_never_silently_emptied(samples, processor):
    whole = ConversationDataset(samples, processor)[0]
    length = whole["input_ids"].shape[1]
    cut = ConversationDataset(samples, processor, length - 3)[0]
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, :-3])
    assert torch.equal(cut["labels"], whole["labels"][:, :-3])
    assert torch.equal(cut["pixel_values"], whole["pixel_values"])
    with pytest.raises(TwigVLMError, match=r"sample 's0': no answer within the first 20 tokens"):
        ConversationDataset(samples, processor, 20, strict=True)[0]


def test_collator_pads_on_the_right(dataset):
    batch = Collator(pad_token_id=0)([dataset[0], dataset[1]])
    short, long = dataset[0]["input_ids"].shape[1], dataset[1]["input_ids"].shape[1]
    assert short < long
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, long)
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["attention_mask"].sum(1).tolist() == [short, long]
    assert (batch["input_ids"][0, short:] == 0).all()
    assert (batch["labels"][0, short:] == IGNORE).all()


def test_collator_fills_up_pictures_of_other_sizes():
    """As the processors do where they are given several at once: zeros at the end of each dimension."""
    ids = torch.tensor([[1, 2]])
    one = {"input_ids": ids, "labels": ids, "pixel_values": torch.ones(1, 3, 3, 4, 4), "image_sizes": torch.ones(1, 2)}
    other = {**one, "pixel_values": 2 * torch.ones(2, 5, 3, 2, 6)}
    batch = Collator(pad_token_id=0)([one, other])
    assert batch["pixel_values"].shape == (3, 5, 3, 4, 6)
    assert torch.equal(batch["pixel_values"][:1, :3, :, :, :4], one["pixel_values"])
    assert torch.equal(batch["pixel_values"][1:, :, :, :2], other["pixel_values"])
    assert batch["pixel_values"].sum() == one["pixel_values"].sum() + other["pixel_values"].sum()
    assert batch["image_sizes"].shape == (2, 2)


def test_hugging_face_datasets_are_taken(samples, dataset, processor):
    table = datasets.Dataset.from_dict({key: [sample[key] for sample in samples] for key in samples[0]})
    item = ConversationDataset(table, processor)[1]
    assert torch.equal(item["input_ids"], dataset[1]["input_ids"])
    assert torch.equal(item["pixel_values"], dataset[1]["pixel_values"])


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


@pytest.mark.parametrize("expansion", ["plain", "rows"])
def test_labels_where_images_lie_between_answers(expansion, monkeypatch):
    """Also where a processor writes more than placeholders for an image, even what stands in the text as well."""
    processor = tiny_processor()
    if expansion == "rows":
        rows = "\n".join(["<image>" * 4] * 4) + "\n"
        monkeypatch.setattr(type(processor), "replace_image_token", lambda *given, **named: f"{rows}Yes.{rows}")
    first = ask(
        "<image>\n<image>\nSame?", "No.", "And now?\n<image>", "Yes.", "Sure? Yes.", "Yes.", image=[RED, BLUE, RED]
    )
    item = ConversationDataset([first], processor, strict=True)[0]
    assert answers(item, processor) == [f"No.{END}", f"Yes.{END}", f"Yes.{END}"]
    labelled = item["labels"] != IGNORE
    assert torch.equal(item["labels"][labelled], item["input_ids"][labelled])
    assert item["pixel_values"].shape == (3, 3, 16, 16)


def test_labels_need_no_image_and_no_system_turn(processor):
    text = ask("What?", "That.")
    chat = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": "That."},
        ]
    }
    dataset = ConversationDataset([text, chat], processor, strict=True)
    for item in (dataset[0], dataset[1]):
        assert answers(item, processor) == [f"That.{END}"]
        assert item.keys() == {"input_ids", "attention_mask", "labels"}
    system = processor.tokenizer.decode(dataset[1]["input_ids"][0])
    assert "Be brief." in system


def test_batches_mix_samples_with_and_without_images(samples, processor):
    data = [ask("What?", "That."), samples[0], ask("<image><image>Same?", "No.", images=[RED, BLUE])]
    dataset = ConversationDataset(data, processor, strict=True)
    batch = Collator(pad_token_id=0)([dataset[index] for index in range(3)])
    assert batch["input_ids"].shape[0] == batch["labels"].shape[0] == batch["attention_mask"].shape[0] == 3
    pixels = [dataset[1]["pixel_values"], dataset[2]["pixel_values"]]
    assert torch.equal(batch["pixel_values"], torch.cat(pixels))
    assert (batch["input_ids"] == IMAGE_TOKEN).sum(1).tolist() == [0, VISUAL, 2 * VISUAL]
    assert "pixel_values" not in Collator(pad_token_id=0)([dataset[0]])


def test_a_key_per_token_that_only_some_samples_have_is_filled():
    ids = torch.tensor([[1, 2, 3]])
    one = {"input_ids": ids, "labels": ids, "kinds": torch.ones_like(ids)}
    other = {"input_ids": ids[:, :2], "labels": ids[:, :2]}
    assert Collator(pad_token_id=0)([other, one])["kinds"].tolist() == [[0, 0, 0], [1, 1, 1]]


def test_grey_pictures_become_rgb(samples, processor):
    samples[0]["image"] = Image.new("L", (20, 20), 100)
    assert ConversationDataset(samples, processor)[0]["pixel_values"].shape == (1, 3, 16, 16)
