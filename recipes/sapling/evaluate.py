"""What Sapling sees: accuracy per kind of question on test scenes, greedy, no pruning.

python -m recipes.sapling.evaluate --questions 2000 --descriptions 200
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from rich.progress import Progress
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration, LlavaProcessor

from recipes.sapling.questions import SHORT_KINDS, Turn, conversation
from recipes.sapling.scenes import KINDS, Scene, make_scene, render
from twigvlm import sapling

NAMES = {form: index for index, kind in enumerate(KINDS) for form in (kind.name, kind.plural)}
DESCRIPTION, SHORT_ANSWER = 160, 12  # most tokens of an answer


def named(text: str) -> set[int]:
    """Kinds of things that a text names; words in capitals are a sign's."""
    return {NAMES[word] for word in re.findall(r"\b[a-z]+\b", text) if word in NAMES}


@dataclass
class Tally:
    """Exact matches per kind, and the overlap of named and present things."""

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    found: int = 0
    claimed: int = 0
    present: int = 0

    def short(self, turn: Turn, answer: str) -> None:
        name = turn.kind + (", held out" if turn.held_out else "")
        self.asked[name] += 1
        self.right[name] += answer.strip().lower() == turn.answer.lower()

    def description(self, scene: Scene, answer: str) -> None:
        there, claimed = {thing.kind for thing in scene.things}, named(answer)
        self.found += len(there & claimed)
        self.claimed += len(claimed)
        self.present += len(there)

    def table(self) -> str:
        """Markdown."""
        seen = [kind for kind in SHORT_KINDS if self.asked[kind]]
        rows = [*seen, *sorted(kind for kind in self.asked if kind not in SHORT_KINDS)]
        lines = ["| questions | number | exact match |", "|---|---|---|"]
        lines += [
            f"| {kind} | {self.asked[kind]} | {100 * self.right[kind] / self.asked[kind]:.1f} % |" for kind in rows
        ]
        right, asked = sum(self.right.values()), sum(self.asked.values())
        if asked:
            lines.append(f"| **all short answers** | {asked} | **{100 * right / asked:.1f} %** |")
        if self.claimed:
            recall, precision = 100 * self.found / self.present, 100 * self.found / self.claimed
            lines.append(
                f"| things in descriptions | {self.present} | recall {recall:.1f} %, precision {precision:.1f} % |"
            )
        return "\n".join(lines)


class SharedPicture:
    """Answers questions about one picture, whose part of the prompt is computed once."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor, scene: Scene) -> None:
        self.model, self.processor = model, processor
        prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
        self.opening = prompt[: prompt.index(processor.image_token) + len(processor.image_token)]
        inputs = processor(images=render(scene), text=self.opening, return_tensors="pt")
        self.cache = DynamicCache()
        model(**inputs.to(model.dtype), past_key_values=self.cache, logits_to_keep=1)
        self.length = self.cache.get_seq_length()

    def ask(self, question: str, most_tokens: int) -> str:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        text = self.processor.apply_chat_template([message], add_generation_prompt=True)
        tokenizer = self.processor.tokenizer
        ids: Tensor = tokenizer(text.removeprefix(self.opening), return_tensors="pt").input_ids
        answer: list[int] = []
        while len(answer) < most_tokens:
            logits = self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1).logits
            token = int(logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            answer.append(token)
            ids = torch.tensor([[token]])
        self.cache.crop(self.length - self.cache.get_seq_length())  # a negative number: tokens to forget
        return tokenizer.decode(answer)


def questions(scene: Scene, most: int) -> Iterator[Turn]:
    """The first short questions of a scene's conversation."""
    yield from [turn for turn in conversation(scene) if turn.kind != "description"][:most]


@torch.inference_mode()
def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    split: str,
    count: int,
    descriptions: int,
    log: Callable[[dict[str, object]], None],
    per_scene: int = 4,
) -> Tally:
    tally = Tally()
    with Progress() as progress:
        task = progress.add_task("answers", total=count + descriptions)
        for index in itertools.count():
            left = count - tally.asked.total()
            if not left and index >= descriptions:
                return tally
            scene = make_scene(split, index)
            picture = SharedPicture(model, processor, scene)
            for turn in questions(scene, min(per_scene, left)):
                answer = picture.ask(turn.question, SHORT_ANSWER)
                tally.short(turn, answer)
                log({"scene": index, **vars(turn), "given": answer})
                progress.advance(task)
            if index < descriptions:
                turn = next(turn for turn in conversation(scene) if turn.kind == "description")
                answer = picture.ask(turn.question, DESCRIPTION)
                tally.description(scene, answer)
                log({"scene": index, **vars(turn), "given": answer})
                progress.advance(task)
    raise AssertionError("the scenes of a split do not end")


@dataclass
class Options:
    split: str = "test"
    questions: int = 2000
    descriptions: int = 200
    log: Path | None = None
    """File for every answer, one JSON object per line."""


def main(options: Options) -> None:
    model, processor = sapling.load(sapling.fast_dtype(torch.device("cpu")))
    model.set_attn_implementation("eager")  # much the faster one here: single queries, grouped heads, bf16, a CPU
    with options.log.open("w") if options.log else nullcontext() as log:
        tally = evaluate(
            model,
            processor,
            options.split,
            options.questions,
            options.descriptions,
            lambda entry: print(json.dumps(entry), file=log, flush=True) if log else None,
        )
    print(tally.table())


if __name__ == "__main__":
    main(tyro.cli(Options))
