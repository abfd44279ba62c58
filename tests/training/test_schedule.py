"""FitPrune's schedule from conversations is the one that their first questions give."""

import pytest

from tests.tiny import tiny_llava
from tests.tiny_processor import tiny_processor
from tests.training.runs import make_dataset
from twigvlm import TwigVLMError
from twigvlm.base.vlm import BaseVLM
from twigvlm.cli.train import CalibrateSchedule
from twigvlm.pruning.methods.fitprune import FitPrune
from twigvlm.training.data.dataset import IGNORE, ConversationDataset
from twigvlm.training.schedule import calibrate_schedule


def test_the_first_questions_are_what_it_is_fitted_to():
    base, data = BaseVLM(tiny_llava()), make_dataset()
    prompts = []
    for sample in (data[0], data[1]):
        end = int((sample["labels"][0] != IGNORE).nonzero()[0, 0])
        pixels = {"pixel_values": sample["pixel_values"]}
        prompts.append({"input_ids": sample["input_ids"][:, :end], **pixels})
    visual = sum(int(base.visual_mask(one["input_ids"]).sum()) for one in prompts) / 2
    assert calibrate_schedule(base, data, visual / 2, 2) == FitPrune.calibrated(base, prompts, 0.5)


def test_what_cannot_be_fitted_is_refused():
    base, data = BaseVLM(tiny_llava()), make_dataset()
    with pytest.raises(TwigVLMError, match="retain=1000: must be more than"):
        calibrate_schedule(base, data, 1000, 2)
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    text = ConversationDataset([{"conversations": turns}], tiny_processor())
    with pytest.raises(TwigVLMError, match="none of the first 1 conversations has images in its first question alone"):
        calibrate_schedule(base, text, 4, 2)


def test_a_picture_in_a_later_turn_leaves_a_conversation_out():
    base, data = BaseVLM(tiny_llava()), make_dataset()
    sample = next(each for each in data.samples if each.get("image") or each.get("images"))
    turns = [
        {"from": "human", "value": "What?"},
        {"from": "gpt", "value": "That."},
        *sample["conversations"],
    ]
    later = ConversationDataset([{**sample, "conversations": turns}], tiny_processor())
    with pytest.raises(TwigVLMError, match="has images in its first question alone"):
        calibrate_schedule(base, later, 4, 1)


def test_what_a_schedule_does_not_know_is_refused(tmp_path):
    with pytest.raises(TwigVLMError, match="resume: does not apply"):
        CalibrateSchedule(data=tmp_path, out=tmp_path, resume=True).check()
