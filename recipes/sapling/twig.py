r"""The twig that ships: stage 1 on the shipped base, from the twig of the generation before where there is one.

python -m recipes.sapling.questions --split train --count 4000 --output runs/twig-data
python -m recipes.sapling.twig --data runs/twig-data --output runs/twig --start old-twig/twig_model.safetensors
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file

from recipes.sapling.ablation_runs import DISTILLED, TEACHER, TWIG
from recipes.sapling.ablations import conversations, save
from twigvlm import sapling
from twigvlm.model import TwigVLM
from twigvlm.training.data.dataset import ConversationDataset, frequent_answer_tokens
from twigvlm.training.distill import train_stage1
from twigvlm.training.options import Stage1Config

SHAPE = dataclasses.replace(TWIG, trunk_layers=1)
STAGE = Stage1Config(
    batch_size=4, learning_rate=6e-4, teacher_layers=TEACHER, gamma_answers=1.0, log_steps=5, save_steps=20, **DISTILLED
)


@dataclass(frozen=True)
class Options:
    data: Path
    """Folder of `conversations.json`."""
    output: Path
    """Gets the twig; goes on from the newest checkpoint in it."""
    start: Path | None = None
    """Weights of a twig of the same shape, for another base of this architecture. None: grown from the base."""
    samples: int = 4000
    """Conversations, each seen once; their answers decide which tokens can be drafted."""
    threads: int = 2


def begin_from(model: TwigVLM, weights: Path) -> None:
    """Load what a twig of another base learned; which tokens it drafts stays as it is.

    Raises:
        SystemExit: the weights are of another shape.
    """
    twig = {name: value for name, value in load_file(weights).items() if name != "draft_token_ids"}
    state = model.twig.state_dict()
    for name, value in twig.items():
        if name not in state or state[name].shape != value.shape:
            raise SystemExit(f"{weights}: {name} does not fit a twig of this shape; leave --start out")
    model.twig.load_state_dict({**state, **twig})


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    base, processor = sapling.load(torch.bfloat16)
    data = conversations(options.data, options.samples)
    torch.manual_seed(STAGE.seed)
    model = TwigVLM.grow(base, SHAPE, frequent_answer_tokens(data, processor, SHAPE.draft_vocabulary))
    if options.start is not None:
        begin_from(model, options.start)
    train_stage1(model, ConversationDataset(data, processor), STAGE, options.output / "checkpoints", resume=True)
    save(model, options.output)


if __name__ == "__main__":
    main(tyro.cli(Options))
