"""Broken samples: another one stands in for each, or each is an error of one line that says what is wrong."""

import pytest
import torch

from tests.tiny_processor import CHAT_TEMPLATE, tiny_processor
from tests.training.conversations import RED, ask
from tests.training.runs import grow
from tests.training.stage1 import run
from twigvlm.errors import TwigVLMError
from twigvlm.training.data.dataset import ConversationDataset, frequent_answer_tokens
from twigvlm.training.data.samples import BrokenSample


@pytest.fixture
def torn(samples, tmp_path):
    """The eight samples; the pictures of the third, fourth and last cannot be read."""
    (tmp_path / "torn.png").write_bytes(b"nothing")
    for number in (2, 3):
        samples[number]["image"] = str(tmp_path / "torn.png")
    samples[7]["image"] = b"nothing"
    return samples


def test_the_next_good_sample_stands_in_for_a_broken_one(torn, dataset, processor, caplog):
    stands = {2: 4, 3: 4, 7: 0}
    repaired = ConversationDataset(torn, processor)
    for index in (7, 3, 2, 0, 1, 4, 5, 6, 7, 3):  # in any order, and again
        item, wanted = repaired[index], dataset[stands.get(index, index)]
        assert all(torch.equal(item[key], wanted[key]) for key in wanted), index
    repaired.summarise()
    first, second, third, last = caplog.messages
    assert first.startswith("skipped sample 's7': image: not an image")
    assert "sample 's3'" in second
    assert "sample 's2'" in third
    assert last == "skipped 3 of 8 samples"
    with pytest.raises(IndexError):
        repaired[8]


def test_processes_beside_the_training_share_what_is_broken(torn, processor, caplog):
    repaired = ConversationDataset(torn, processor)
    loader = torch.utils.data.DataLoader(repaired, batch_size=None, num_workers=1)
    assert len(list(loader)) == 8
    repaired.summarise()
    assert caplog.messages == ["skipped 3 of 8 samples"]


def test_broken_samples_are_errors_when_strict(torn, processor):
    strict = ConversationDataset(torn, processor, strict=True)
    strict[0]
    with pytest.raises(BrokenSample, match=r"sample 's2': image .*not an image"):
        strict[2]


def test_only_broken_samples_are_an_error(processor):
    data = ConversationDataset([ask("What?", "That.", id="one", image=b""), {}], processor)
    with pytest.raises(TwigVLMError, match="all 2 samples are broken; sample 1: has no list of turns"):
        data[0]
    with pytest.raises(TwigVLMError, match="all 2 samples are broken"):
        data[1]


class Unreadable(list):
    def __getitem__(self, index):
        raise OSError("no\nsuch block")


@pytest.mark.parametrize(
    ("sample", "options", "words"),
    [
        (ask("What?", "That.", "<image>And?", "This.", image=RED), {"max_length": 40}, "image comes after the first 40"),
        (ask("What?", "That."), {"max_length": 10}, "no answer within the first 10 tokens"),
        (ask("<image>What?", "That.", image="none.png"), {}, "no such file"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "<image>?"}]},
                       {"role": "assistant", "content": "No."}]}, {}, "contains the image placeholder"),
        ({"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "No."}]}, {}, "turn 1 is from"),
    ],
)  # fmt: skip
def test_what_is_broken_only_here(sample, options, words, processor):
    with pytest.raises(BrokenSample, match=words) as caught:
        ConversationDataset([{**sample, "id": "abc"}], processor, strict=True, **options)[0]
    assert str(caught.value).startswith("sample 'abc': ")


def test_what_the_template_the_processor_or_the_disk_refuses_is_broken(samples, processor, monkeypatch):
    def refused(words, data, processor):
        with pytest.raises(BrokenSample, match=words) as caught:
            ConversationDataset(data, processor, strict=True)[0]
        assert "\n" not in str(caught.value)

    refused("sample 0: cannot be read .no such block.", Unreadable([1]), processor)
    template = "{{ raise_exception('no\nsystem') }}"
    refused("sample 's0': rejected by the chat template .no system.", samples, tiny_processor(template))
    plain = "{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}"
    refused("sample 's0': rejected by the chat template .can only concatenate", samples, tiny_processor(plain))
    refused("sample 's0': the processor has no chat template", samples, tiny_processor(None))
    monkeypatch.setattr(type(processor.image_processor), "__call__", lambda self, images, **rest: 1 / 0)
    refused("sample 's0': rejected by the processor .division by zero.", samples, processor)


def test_a_processor_that_tokenizes_otherwise_is_refused(samples, processor):
    class Shouting:
        """Turns the text it is given to capitals, as its tokenizer alone does not."""

        def __getattr__(self, name):
            return getattr(processor, name)

        def __call__(self, text, **options):
            return processor(text=text.replace("red", "RED"), **options)

    with pytest.raises(BrokenSample, match="tokenizes the answers otherwise"):
        ConversationDataset(samples, Shouting(), strict=True)[0]


def test_broken_samples_do_not_count_for_the_draft_vocabulary(samples, processor):
    wanted = frequent_answer_tokens(samples, processor, 5)
    assert torch.equal(frequent_answer_tokens([{}, *samples, {}], processor, 5), wanted)


def test_errors_of_processes_beside_the_training_are_one_line(samples, torn, tmp_path):
    rewriting = tiny_processor("{{ (messages|length) // 3 }}" + CHAT_TEMPLATE)
    for data, message in (
        (ConversationDataset(samples[:2], rewriting), "^chat template: rewrites earlier turns"),
        (ConversationDataset(torn[:3], tiny_processor(), strict=True), "^sample 's2': .*torn.png"),
    ):
        with pytest.raises(TwigVLMError, match=message) as caught:
            run(grow(), data, tmp_path / "run", workers=1, batch_size=1, max_steps=3)
        assert "\n" not in str(caught.value)
        assert type(caught.value) is (BrokenSample if data.strict else TwigVLMError)
