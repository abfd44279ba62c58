r"""The twig that ships: both stages on the shipped base, the first from the twig of the generation before where there is one.

python -m recipes.sapling.questions --split train --count 4000 --output runs/twig-data
python -m recipes.sapling.twig --data runs/twig-data --output runs/twig --start old-twig/twig_model.safetensors
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file

from recipes.sapling.ablation_runs import DISTILLED, TEACHER, TWIG
from recipes.sapling.ablations import conversations, newest_checkpoint, save
from twigvlm import sapling
from twigvlm.model import TwigVLM
from twigvlm.training.data.dataset import ConversationDataset, frequent_answer_tokens
from twigvlm.training.distill import train_stage1
from twigvlm.training.options import Stage1Config, Stage2Config
from twigvlm.training.reinforce import train_stage2

SHAPE = dataclasses.replace(TWIG, trunk_layers=1)
DISTILLING = Stage1Config(
    batch_size=4, learning_rate=6e-4, teacher_layers=TEACHER, gamma_answers=1.0, log_steps=5, save_steps=20, **DISTILLED
)
REWARDING = Stage2Config(
    batch_size=8,
    learning_rate=1e-3,
    group=16,
    span=16,
    budgets=(48, 64, 128),
    beta=0.0,
    gamma=(0.0, 0.0),
    log_steps=5,
    save_steps=20,
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
    """Conversations of stage 1, each seen once; their answers decide which tokens can be drafted."""
    rewarded: int = 1200
    """Questions of stage 2, each of another picture."""
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


def one_question_each(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each conversation one turn: the one with the longest answer of every third, of the others one with a short answer."""
    chosen: list[dict[str, Any]] = []
    for number, sample in enumerate(samples):
        messages = sample["conversations"]
        turns = sorted(zip(messages[::2], messages[1::2], strict=True), key=lambda turn: len(turn[1]["value"]))
        question, answer = turns[-1] if number % 3 == 0 else turns[number % max(1, len(turns) - 2)]
        asked = "<image>\n" + question["value"].removeprefix("<image>\n")
        chosen.append({**sample, "conversations": [{**question, "value": asked}, answer]})
    return chosen


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    base, processor = sapling.load(torch.bfloat16)
    data = conversations(options.data, options.samples)
    torch.manual_seed(DISTILLING.seed)
    model = TwigVLM.grow(base, SHAPE, frequent_answer_tokens(data, processor, SHAPE.draft_vocabulary))
    if options.start is not None:
        begin_from(model, options.start)
    distilled = options.output / "distilled"
    train_stage1(model, ConversationDataset(data, processor), DISTILLING, distilled / "checkpoints", resume=True)
    save(model, distilled)
    # The trained float32 weights: after stage 1 the twig in memory has the base's number format.
    state = load_file(newest_checkpoint(model, distilled))
    model.twig.float().load_state_dict({name.removeprefix("twig."): value for name, value in state.items()})
    questions = ConversationDataset(one_question_each(data[-options.rewarded :]), processor)
    train_stage2(model, questions, REWARDING, options.output / "checkpoints", resume=True)
    save(model, options.output)


if __name__ == "__main__":
    main(tyro.cli(Options))
