"""Small trainings, in this process or in others: `python -m tests.training.runs WHAT DIRECTORY`."""

import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from transformers import TrainerState

from tests.tiny import tiny_llava
from tests.tiny_processor import tiny_processor
from tests.training.stop import StopAt
from twigvlm.cli.main import main
from twigvlm.config import TwigConfig
from twigvlm.model import TwigVLM
from twigvlm.training.data.dataset import ConversationDataset
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
    """Both stages, the first once whole and once in two parts; each process keeps what it ends with. Then the command."""
    rank = int(os.environ["RANK"])
    model = grow(seed=rank)  # what the main process drew counts
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
    words = ["train", "stage1", "--data", "data.json", "--out", "twig", "--model", "base", "--twig-layers", "2"]
    os.chdir(directory)
    sys.exit(main([*words, "--batch-size", "2", "--max-steps", "2", "--log-steps", "1"]))


def killed(directory):
    """Stage 1, killed at the first thing it writes or removes, resumed and killed at the second, and so on to its end."""
    for moment in itertools.count(1):
        child = os.fork()
        if child == 0:
            be_killed_at(moment)
            model = grow()
            stage1(model, directory / "run", resume=True, accumulate=1, save_steps=1)
            torch.save(model.twig.state_dict(), directory / "twig.pt")
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            return
        assert os.WTERMSIG(status) == signal.SIGKILL


def be_killed_at(moment):
    """Have this process killed at that write or removal, counted from 1; a file is then half written."""
    moments = itertools.count(1)

    def mortal(function, path=None):
        def run(*args, **kwargs):
            last = next(moments) == moment
            if path is not None or not last:
                function(*args, **kwargs)
            if last:
                if path is not None:
                    os.truncate(args[path], os.path.getsize(args[path]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return run

    for owner, name, path in (
        (torch, "save", 1), (safetensors.torch, "save_file", 1), (TrainerState, "save_to_json", 1),
        (os, "replace", None), (shutil, "rmtree", None),
    ):  # fmt: skip
        setattr(owner, name, mortal(getattr(owner, name), path))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"together": together, "killed": killed}[sys.argv[1]](Path(sys.argv[2]))
