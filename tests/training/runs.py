"""Small trainings, in this process or in others: `python -m tests.training.runs WHAT DIRECTORY`."""

import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image

from tests.tiny import tiny_llava
from tests.tiny_processor import tiny_processor
from tests.training.stop import StopAt
from twigvlm.config import TwigConfig
from twigvlm.model import TwigVLM
from twigvlm.training.data import ConversationDataset
from twigvlm.training.distill import train_stage1
from twigvlm.training.options import Stage1Config, Stage2Config
from twigvlm.training.reinforce import train_stage2


def make_samples():
    """Eight samples of one or two turns; the answers follow from the pictures' colours."""
    made = []
    for number, colour in enumerate(["red", "green", "blue", "white"] * 2):
        turns = [("human", "<image>\nWhat colour?"), ("gpt", f"It is {colour}.")]
        if number % 2:
            turns += [("human", "Sure?"), ("gpt", "Yes.")]
        conversations = [{"from": speaker, "value": value} for speaker, value in turns]
        made.append({"id": f"s{number}", "image": Image.new("RGB", (20, 20), colour), "conversations": conversations})
    return made


def make_dataset():
    """The samples, and one without a picture, which one process meets while another has a picture."""
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    return ConversationDataset([*make_samples()[:7], {"conversations": turns}], tiny_processor())


def grow(seed=0):
    torch.manual_seed(seed)
    return TwigVLM.grow(tiny_llava(), TwigConfig(trunk_layers=1, twig_layers=2, pruning_head=True, final_wipe=5))


def stage1(model, directory, resume=False, callbacks=(), **options):
    common = {"batch_size": 1, "accumulate": 2, "max_steps": 3, "save_steps": 2, "log_steps": 1, "learning_rate": 1e-3}
    return train_stage1(model, make_dataset(), Stage1Config(**{**common, **options}), directory, resume, callbacks)


def stage2(model, directory, **options):
    common = {"batch_size": 1, "max_steps": 4, "log_steps": 1, "learning_rate": 1e-2, "group": 4, "budgets": (5.0, 9.0)}
    return train_stage2(model, make_dataset(), Stage2Config(**{**common, **options}), directory)


def together(directory):
    """Both stages, the first once whole and once in two parts; each process keeps what it ends with."""
    rank = int(os.environ["RANK"])
    # what the main process draws counts
    model = grow(seed=rank)
    logs = {"stage1": stage1(model, directory / "whole")}
    twigs = {"stage1": {name: tensor.clone() for name, tensor in model.twig.state_dict().items()}}
    stage1(grow(), directory / "parts", callbacks=[StopAt(2)])
    resumed = grow(seed=5)
    stage1(resumed, directory / "parts", resume=True)
    twigs["resumed"] = resumed.twig.state_dict()
    logs["stage2"] = stage2(model, directory / "tuned")
    twigs["stage2"] = model.twig.state_dict()
    torch.save(twigs, directory / f"twigs-{rank}.pt")
    (directory / f"logs-{rank}.json").write_text(json.dumps(logs))
    torch.distributed.destroy_process_group()


def endless(directory):
    """Stage 1 for so many steps that it must be killed."""
    stage1(grow(), directory, max_steps=100_000, save_steps=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"together": together, "endless": endless}[sys.argv[1]](Path(sys.argv[2]))
