"""Twigs that differ in one thing each: trained, asked in batches, and put into a table.

    python -m recipes.sapling.questions --split train --count 12000 --output runs/twig-data
    python -m recipes.sapling.questions --split test --count 1000 --evaluation --output runs/eval-test
    python -m recipes.sapling.ablations --data runs/twig-data --questions runs/eval-test --output runs/ablations

What is finished is not repeated. Several processes may share a GPU, each with `--runs` of its own; a run of stage 2 needs the one
that it starts from.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from recipes.sapling.ablation_runs import RUNS
from twigvlm.checkpoints.twig_files import WEIGHTS
from twigvlm.cli.session import build_inputs, load_base
from twigvlm.evaluation.metrics import acceptance_rate, bootstrap_interval, mean_accepted_length, relative_accuracy
from twigvlm.evaluation.questions import Question, exact_match, load_questions
from twigvlm.evaluation.report import percent, span, table
from twigvlm.evaluation.variants import Variant
from twigvlm.files import replacing
from twigvlm.model import TwigVLM
from twigvlm.training.data.dataset import ConversationDataset, frequent_answer_tokens
from twigvlm.training.distill import train_stage1
from twigvlm.training.options import Stage1Config
from twigvlm.training.reinforce import train_stage2

LOG = "log.json"  # the Trainer's; written last, so that a run that has one is finished
PLAIN = "no pruning"  # the base alone
COUNTED = 1000  # conversations whose answers decide which tokens can be drafted
LONGEST = 192  # tokens of the descriptions that drafts are counted in
SHORT = 15  # words of an answer; a description has more


@dataclass(frozen=True)
class Options:
    data: Path
    """Folder of `conversations.json`."""
    questions: tuple[Path, ...]
    """Folders of `questions.json`: short questions are answered under every budget, descriptions drafted as chains, without
    pruning."""
    output: Path
    runs: tuple[str, ...] = tuple(RUNS)
    """Trained and asked, in this order; the table shows them and all that were asked before."""
    batch: int = 100
    """Questions asked together."""
    device: str = "auto"
    workers: int = 2
    """Processes that prepare pictures beside a training."""


def conversations(folder: Path, count: int, short: bool = False) -> list[dict[str, Any]]:
    """The first samples; `short`: the first that begin with a short question, with that one alone."""
    samples = json.loads((folder / "conversations.json").read_text())
    if short:
        samples = [{**sample, "conversations": sample["conversations"][:2]} for sample in samples]
        samples = [sample for sample in samples if len(sample["conversations"][1]["value"].split()) <= SHORT]
    if len(samples) < count:
        raise SystemExit(f"{folder}: holds {len(samples)} conversations, {count} are needed; export more")
    return [{**sample, "image": str(folder / sample["image"])} for sample in samples[:count]]


def train(name: str, options: Options) -> None:
    """Train a run's twig into its folder, from its newest checkpoint if there is one."""
    run, folder = RUNS[name], options.output / name
    base, processor = load_base("sapling", "auto", options.device)
    stage = dataclasses.replace(run.stage, workers=options.workers)
    if isinstance(stage, Stage1Config):
        counted = conversations(options.data, min(run.samples, COUNTED))
        tokens = frequent_answer_tokens(counted, processor, run.twig.draft_vocabulary or len(processor.tokenizer))
        torch.manual_seed(stage.seed)
        model = TwigVLM.grow(base, run.twig, tokens)
        data = ConversationDataset(conversations(options.data, run.samples), processor)
        log = train_stage1(model, data, stage, folder / "checkpoints", resume=True)
    else:
        model = TwigVLM.from_pretrained(base, options.output / str(run.start))
        data = ConversationDataset(conversations(options.data, run.samples, short=True), processor)
        log = train_stage2(model, data, stage, folder / "checkpoints", resume=True)
    save(model, folder)
    with replacing(folder / LOG) as temporary:
        temporary.write_text(json.dumps(log))


def save(model: TwigVLM, folder: Path) -> None:
    """Write a twig whose checkpoints are in `folder`; its file knows the base by its weights in float32."""
    model.save_pretrained(folder)
    exact, _ = load_base("sapling", "float32", "cpu")
    TwigVLM.from_pretrained(exact, folder).save_pretrained(folder)
    round_once(newest_checkpoint(model, folder), folder / WEIGHTS)


def newest_checkpoint(model: TwigVLM, folder: Path) -> Path:
    """The float32 weights that the last training of a twig ended with."""
    return folder / "checkpoints" / f"checkpoint-{model.twig.record[-1]['steps']}" / "model.safetensors"


def round_once(trained: Path, saved: Path) -> None:
    """Put the trained float32 weights, in float16, in the place of the saved ones, which may have gone through bfloat16."""
    with safe_open(saved, "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    state = {name.removeprefix("twig."): value for name, value in load_file(trained).items()}
    state = {name: state[name].half() if state[name].is_floating_point() else state[name] for name in names}
    with replacing(saved) as temporary:
        save_file(state, temporary, metadata=metadata)


@dataclass(frozen=True)
class Batch:
    """Questions, and the base's inputs of them."""

    questions: Sequence[Question]
    inputs: dict[str, Any]


class Asker:
    """Asks in float32, where a batch gives each question the answer that it gets alone."""

    def __init__(self, options: Options) -> None:
        self.base, self.processor = load_base("sapling", "float32", options.device)
        self.short: dict[str, list[Batch]] = {}
        self.descriptions: dict[str, list[Batch]] = {}
        self.digests: dict[str, str] = {}
        for folder in options.questions:
            file = load_questions(folder / "questions.json")
            self.short[file.split] = self._batches(
                [one for one in file.items if one.objects is None and not one.long], options.batch
            )
            long = [one for one in file.items if one.objects is not None]
            self.descriptions[file.split] = self._batches(long, options.batch)
            self.digests[file.split] = hashlib.sha256((folder / "questions.json").read_bytes()).hexdigest()

    def _batches(self, questions: Sequence[Question], size: int) -> list[Batch]:
        groups = [questions[start : start + size] for start in range(0, len(questions), size)]
        return [Batch(group, self._inputs(group)) for group in groups]

    def _inputs(self, questions: Sequence[Question]) -> dict[str, Any]:
        images = [question.image for question in questions]
        return build_inputs(self.base, self.processor, images, [question.prompt for question in questions])

    def ask(self, name: str, folder: Path) -> None:
        """Write what a run's twig answers, a file for each split: `answers` under each budget, and `drafts` of descriptions.

        Splits whose questions it has answered before are left out.
        """
        todo = [split for split in self.short if _digest(asked_file(folder, split)) != self.digests[split]]
        if not todo:
            return
        folder.mkdir(parents=True, exist_ok=True)
        model = self.base if name == PLAIN else TwigVLM.from_pretrained(self.base, folder)
        variants = [Variant(PLAIN)]
        if name != PLAIN:
            run = RUNS[name]
            variants = [Variant("twig", budget, run.twig.final_wipe) for budget in run.budgets]
        for split in todo:
            result = {
                "questions": self.digests[split],
                "answers": {variant.name: self._answers(model, variant, split) for variant in variants},
                "drafts": None if name == PLAIN else self._drafts(model, split),
            }
            with replacing(asked_file(folder, split)) as temporary:
                temporary.write_text(json.dumps(result, indent=1))

    def _answers(self, model: Any, variant: Variant, split: str) -> dict[str, str]:
        pruning = {} if variant.retain is None else {"retain": variant.retain, "final_wipe": variant.final_wipe}
        texts: dict[str, str] = {}
        for batch in self.short[split]:
            ids = model.generate(**batch.inputs, **pruning, max_new_tokens=16, do_sample=False)
            new = ids[:, batch.inputs["input_ids"].shape[1] :]
            answers = self.processor.batch_decode(new, skip_special_tokens=True)
            texts |= {question.id: text.strip() for question, text in zip(batch.questions, answers, strict=True)}
        return texts

    def _drafts(self, model: TwigVLM, split: str) -> dict[str, list[int]]:
        drafted: list[int] = []
        accepted: list[int] = []
        for batch in self.descriptions[split]:
            options = {"max_new_tokens": LONGEST, "do_sample": False, "return_dict_in_generate": True}
            out = model.generate(**batch.inputs, speculate="chain", **options)
            drafted += [count for row in out.drafted_lengths for count in row]
            accepted += [count for row in out.accepted_lengths for count in row]
        return {"drafted": drafted, "accepted": accepted}


def asked_file(folder: Path, split: str) -> Path:
    """Where the answers of the run in `folder` are."""
    return folder / f"asked-{split}.json"


def _digest(asked: Path) -> str | None:
    """Digest of the file of questions that were answered; None: none were, or the file does not say which."""
    return json.loads(asked.read_text()).get("questions") if asked.is_file() else None


class Reporter:
    """Figures of one split, from what the runs in `output` answered."""

    def __init__(self, folder: Path, output: Path) -> None:
        file = load_questions(folder / "questions.json")
        self.split = file.split
        self.questions = [one for one in file.items if one.objects is None and not one.long]
        self.pictures = [one.image for one in self.questions]
        files = {name: asked_file(output / name, file.split) for name in (PLAIN, *RUNS)}
        self.found = {name: json.loads(path.read_text()) for name, path in files.items() if path.is_file()}
        self.plain = self._right(PLAIN, PLAIN)

    def _right(self, name: str, variant: str) -> list[float]:
        answers = self.found[name]["answers"][variant]
        return [float(exact_match(answers[one.id], one.answer)) for one in self.questions]

    def table(self) -> str:
        """One line for each run, budget and K_f."""
        head = ["run", "R̄ / K_f", "exact, %", "RelAcc", "RelAcc - its start's", "TokAR, %", "accepted per step"]
        return table(head, [self._row(name, variant) for name in self.found for variant in self.found[name]["answers"]])

    def _row(self, name: str, variant: str) -> list[str]:
        scores, start = self._right(name, variant), None if name == PLAIN else RUNS[name].start
        # K_f may have been swept for one of both only.
        gains = start in self.found and variant in self.found[start]["answers"]
        drafts = self.found[name]["drafts"] or {"drafted": (), "accepted": ()}
        return [
            name,
            variant.removeprefix("twig@"),
            percent(sum(scores) / len(scores)),
            self._percent(relative_accuracy, scores),
            self._percent(_gain, scores, self._right(start, variant)) if gains else "–",
            percent(acceptance_rate(**drafts)),
            f"{mean_accepted_length(drafts['accepted']):.2f}" if drafts["accepted"] else "–",
        ]

    def _percent(self, statistic: Any, *columns: Sequence[float]) -> str:
        columns = (*columns, self.plain)
        return percent(statistic(*columns)) + span(bootstrap_interval(statistic, *columns, groups=self.pictures))


def _gain(scores: Any, start: Any, plain: Any) -> float:
    return relative_accuracy(scores, plain) - relative_accuracy(start, plain)


def main(options: Options) -> None:
    for name in options.runs:
        if name not in RUNS:
            raise SystemExit(f"run {name!r}: must be one of {', '.join(RUNS)}")
    asker = Asker(options)
    asker.ask(PLAIN, options.output / PLAIN)
    for name in options.runs:
        folder, start = options.output / name, RUNS[name].start
        if start is not None and not (options.output / start / LOG).is_file():
            raise SystemExit(f"run {name!r}: starts from {start!r}; name that one before it")
        if not (folder / LOG).is_file():
            train(name, options)
        asker.ask(name, folder)
    for folder in options.questions:
        reporter = Reporter(folder, options.output)
        print(f"\n{len(reporter.questions)} short questions of the {reporter.split} split\n\n{reporter.table()}")


if __name__ == "__main__":
    main(tyro.cli(Options))
