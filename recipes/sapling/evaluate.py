"""What Sapling sees: accuracy per kind of question on test scenes, greedy, no pruning.

python -m recipes.sapling.evaluate --questions 2000 --descriptions 200
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.progress import Progress
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration, LlavaProcessor

from recipes.sapling.pictures import drawable, render
from recipes.sapling.questions import LONG_KINDS, SHORT_KINDS, evaluation_turns
from recipes.sapling.scenes import KINDS, Scene, make_scene
from recipes.sapling.turns import Turn, thing_name
from twigvlm import sapling
from twigvlm.evaluation.metrics import overlap
from twigvlm.evaluation.questions import Namer, exact_match, quoted

NAMER = Namer({kind.name: (kind.name, kind.plural) for kind in KINDS})
LONG_ANSWER, SHORT_ANSWER = 160, 12  # most tokens of an answer
PER_SCENE = 4  # short questions


@dataclass
class Tally:
    """Exact matches per kind, and the overlap of named and present things."""

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    found: int = 0
    claimed: int = 0
    present: int = 0
    quoted: int = 0
    written: int = 0

    def exact(self, turn: Turn, answer: str) -> None:
        """Count an answer that is right or wrong."""
        name = turn.kind + (", held out" if turn.held_out else "")
        self.asked[name] += 1
        self.right[name] += exact_match(answer, turn.answer)

    def description(self, scene: Scene, answer: str) -> None:
        """Count what a description of a scene names and quotes."""
        found, present, claimed = overlap({thing_name(thing) for thing in scene.things}, NAMER(answer))
        self.found += found
        self.present += present
        self.claimed += claimed
        self.quoted += sum(quoted(sign.text, answer) for sign in scene.signs)
        self.written += len(scene.signs)

    def table(self) -> str:
        """The figures in percent, as a table in Markdown."""
        seen = [kind for kind in (*SHORT_KINDS, *LONG_KINDS) if self.asked[kind]]
        rows = [*seen, *sorted(kind for kind in self.asked if kind not in seen)]
        lines = ["| questions | number | exact match |", "|---|---|---|"]
        lines += [
            f"| {kind} | {self.asked[kind]} | {100 * self.right[kind] / self.asked[kind]:.1f} % |" for kind in rows
        ]
        short = [kind for kind in rows if kind.removesuffix(", held out") in SHORT_KINDS]
        right, asked = (sum(counter[kind] for kind in short) for counter in (self.right, self.asked))
        if asked:
            lines.append(f"| **all short answers** | {asked} | **{100 * right / asked:.1f} %** |")
        if self.claimed:
            recall, precision = 100 * self.found / self.present, 100 * self.found / self.claimed
            lines.append(
                f"| things in descriptions | {self.present} | recall {recall:.1f} %, precision {precision:.1f} % |"
            )
        if self.written:
            lines.append(
                f"| signs quoted in descriptions | {self.written} | {100 * self.quoted / self.written:.1f} % |"
            )
        return "\n".join(lines)


class SharedPicture:
    """Answers questions about one picture, whose part of the prompt is computed once."""

    def __init__(
        self, model: LlavaForConditionalGeneration, processor: LlavaProcessor, scene: Scene, style: str
    ) -> None:
        self.model, self.processor = model, processor
        prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
        self.opening = prompt[: prompt.index(processor.image_token) + len(processor.image_token)]
        inputs = processor(images=render(scene, style), text=self.opening, return_tensors="pt")
        self.cache = DynamicCache()
        model(**inputs.to(model.dtype), past_key_values=self.cache, logits_to_keep=1)
        self.length = self.cache.get_seq_length()

    def ask(self, question: str, max_tokens: int) -> str:
        """The greedy answer to a question about the picture, which is cut off after `max_tokens` tokens."""
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        text = self.processor.apply_chat_template([message], add_generation_prompt=True)
        tokenizer = self.processor.tokenizer
        ids: Tensor = tokenizer(text.removeprefix(self.opening), return_tensors="pt").input_ids
        answer: list[int] = []
        while len(answer) < max_tokens:
            logits = self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1).logits
            token = int(logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            answer.append(token)
            ids = torch.tensor([[token]])
        self.cache.crop(self.length - self.cache.get_seq_length())  # a negative number: tokens to forget
        return tokenizer.decode(answer)


@torch.inference_mode()
def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    options: "Options",
    log: Callable[[dict[str, object]], None],
) -> Tally:
    """Ask questions about the scenes of a split, in their order, until there are as many of each kind as the options say.

    Args:
        model: Sapling.
        processor: its processor.
        options: how many questions, and about which scenes.
        log: called with each answer: `scene`, the fields of its `Turn`, and `given`.
    """
    tally = Tally()
    left = Counter(dict.fromkeys(LONG_KINDS, options.long) | {"description": options.descriptions})
    left["short"] = options.questions
    with Progress() as progress:
        task = progress.add_task("answers", total=left.total())
        for index in itertools.count():
            if not left.total():
                return tally
            scene = make_scene(options.split, index)
            if not drawable(scene, options.style):
                continue
            picture = None
            for turn in evaluation_turns(scene, PER_SCENE):
                kind = turn.kind if turn.kind in LONG_KINDS else "short"
                if not left[kind]:
                    continue
                left[kind] -= 1
                picture = picture or SharedPicture(model, processor, scene, options.style)
                answer = picture.ask(turn.question, SHORT_ANSWER if kind == "short" else LONG_ANSWER)
                if kind == "description":
                    tally.description(scene, answer)
                else:
                    tally.exact(turn, answer)
                log({"scene": index, **vars(turn), "given": answer})
                progress.advance(task)
    raise AssertionError("the scenes of a split do not end")


@dataclass
class Options:
    split: str = "test"
    questions: int = 2000
    """Short ones, at most four about a picture."""
    descriptions: int = 200
    long: int = 50
    """Questions of each other kind that has a long answer."""
    style: Literal["noto", "emojione"] = "noto"
    """Sprites of the pictures; training sees noto alone. Scenes with a thing that the other style lacks are left out."""
    log: Path | None = None
    """File for every answer, one JSON object per line."""


def main(options: Options) -> None:
    model, processor = sapling.load(sapling.fast_dtype(torch.device("cpu")))
    model.set_attn_implementation("eager")  # much the faster one here: single queries, grouped heads, bf16, a CPU
    with options.log.open("w") if options.log else nullcontext() as log:
        tally = evaluate(
            model, processor, options, lambda entry: print(json.dumps(entry), file=log, flush=True) if log else None
        )
    print(tally.table())


if __name__ == "__main__":
    main(tyro.cli(Options))
