"""Speed of exported twigs in vLLM, with the quality of the same answers, against plain vLLM, Hugging Face and this library.

    python -m recipes.vllm_bench --questions runs/eval-test/questions.json --output runs/vllm

In an environment with vLLM (`make test-vllm` makes one), on a CPU or, with `--device cuda --dtype bfloat16`, on a GPU. On a CPU
without its operators torchvision needs tests/vllm/site on PYTHONPATH. Every system has a process of its own; they take turns,
another one begins each time, and only one works at any moment. `--systems` names some of them. A stopped run goes on.
"""

import multiprocessing
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro

from recipes.vllm_worker import System, serve
from twigvlm.cli.export import scout_overrides
from twigvlm.evaluation.accuracy import score
from twigvlm.evaluation.questions import Namer, Question, load_questions
from twigvlm.evaluation.report import page, percent, table
from twigvlm.evaluation.results_log import ResultsLog
from twigvlm.evaluation.speed import in_turn
from twigvlm.evaluation.summary import quality
from twigvlm.images import load_image
from twigvlm.inputs import render, user_turn
from twigvlm.integrations.vllm.bases import save_base
from twigvlm.integrations.vllm.export import export
from twigvlm.loading import SAPLING, load
from twigvlm.sapling import twig_path
from twigvlm.speculation.costs import processor_name

PLAIN = "vLLM"
COLUMNS = (
    "system",
    "tokens/s",
    "× vLLM",
    "prefill, ms",
    "decode, ms/token",
    "accepted",
    "tokens",
    "recall %",
    "precision %",
    "read %",
    "as plain vLLM",
)
NOTE = (
    "Speeds count new tokens over the whole time of the answers, preprocessing and vision included. Prefill is the median "
    "time of answers of one token; with a twig, vLLM has drafted the tokens after it by then, so it includes as many draft "
    "steps as it drafts tokens. Decode is the time of each token after the first: that of the whole answers less that of "
    "answers of one token. Accepted are drafted tokens per step that verified some. Recall and precision are of the things "
    "that descriptions name, read is the share of signs that they quote."
)


@dataclass(frozen=True)
class Options:
    questions: Path
    """JSON file of questions; its descriptions are asked."""
    output: Path
    """Directory for the exports, raw results and the report; a run with the same options goes on there."""
    model: str = "sapling"
    """The base: `sapling`, a Hugging Face id or a directory."""
    twig: str | None = None
    """Its twig; None: Sapling's own."""
    limit: int = 50
    """Descriptions."""
    batch: int = 8
    """Rows of the larger batches."""
    tokens: tuple[int, ...] = (2, 3, 4, 6)
    """Drafted per step, one system each."""
    retain: float = 64
    """R̄ of the systems that prune; the kept tokens also differ from each other."""
    max_new_tokens: int = 192
    dtype: str = "float32"
    device: str = "cpu"
    gpu_share: float = 0.1
    """Of the GPU's memory, for each engine of vLLM; all of them are loaded at the same time."""
    systems: tuple[str, ...] = ()
    """Names of systems to run; none: all."""


def prepare(options: Options) -> tuple[list[System], list[dict[str, Any]], list[Question], Namer]:
    """Export base (of LLaVA-1.5 type) and twig, and make the systems, and the questions as prompts."""
    if options.twig is None and options.model != SAPLING:
        raise SystemExit(f"--model {options.model}: has no twig of its own; name one with --twig")
    twig = str(twig_path()) if options.twig is None else options.twig
    _, processor, model = load(options.model, twig, options.dtype, "cpu")
    assert model is not None, "it has a twig"
    base, drafter = options.output / "base", options.output / "drafter"
    if not base.exists():
        save_base(model.model, processor, base)
    export(model, drafter)
    plain = System(
        PLAIN,
        "vllm",
        str(base),
        str(drafter),
        twig,
        dtype=options.dtype,
        device=options.device,
        rows=options.batch,
        gpu_share=options.gpu_share,
    )
    overrides = scout_overrides(model, processor, str(drafter), options.retain, diverse=True)
    systems = [plain, *(replace(plain, name=f"vLLM + twig ({count})", tokens=count) for count in options.tokens)]
    best = 4 if 4 in options.tokens else options.tokens[0]
    pruned = f"R̄ {options.retain:g}, diverse"
    systems += [
        replace(plain, name=f"vLLM, scout {pruned}", overrides=overrides, retain=options.retain),
        replace(
            plain, name=f"vLLM + twig ({best}), scout {pruned}", tokens=best, overrides=overrides, retain=options.retain
        ),
        replace(plain, name="HF generate", engine="hf"),
        replace(plain, name="twigvlm, auto", engine="twigvlm"),
        replace(plain, name=f"twigvlm, auto, {pruned}", engine="twigvlm", retain=options.retain),
    ]
    names = [system.name for system in systems]
    if unknown := set(options.systems) - set(names):
        raise SystemExit(f"--systems {', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    systems = [system for system in systems if not options.systems or system.name in options.systems]
    loaded = load_questions(options.questions)
    asked = [question for question in loaded.items if question.objects is not None][: options.limit]
    prompts = []
    for question in asked:
        picture = load_image(question.image)
        text = render(processor, [user_turn(question.prompt, picture)])
        prompts.append({"text": text, "picture": picture, "question": question.prompt})
    return systems, prompts, asked, Namer(loaded.vocabulary)


def ask(connection: Any, prompts: Sequence[dict[str, Any]], max_new_tokens: int) -> dict[str, Any]:
    """One answer of a system's process."""
    connection.send((*([prompt[key] for prompt in prompts] for key in ("text", "picture", "question")), max_new_tokens))
    return dict(connection.recv())


def machine(device: str) -> dict[str, Any]:
    """What times depend on beside the options."""
    versions = {name: version(name) for name in ("vllm", "torch", "transformers", "twigvlm")}
    processor = torch.cuda.get_device_name() if device == "cuda" else processor_name()
    return {**versions, "threads": torch.get_num_threads(), "machine": processor}


def measure(options: Options, systems: Sequence[System], prompts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of every system on every batch: `system`, `rows`, `first` (index of its questions), and the answer."""
    fixed = {name: str(value) for name, value in asdict(options).items() if name not in ("output", "limit", "systems")}
    log, records = ResultsLog(options.output / "results.jsonl", {**fixed, **machine(options.device)}), []
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    for system in systems:
        connections[system.name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, system), daemon=True))
        processes[-1].start()
        theirs.close()
        assert connections[system.name].recv() == "ready"
        print(f"{system.name}: loaded", flush=True)
    for system in systems:  # what is compiled or measured at first counts for nobody
        for rows in (1, options.batch):
            ask(connections[system.name], prompts[:rows], 8)
    for rows in (1, options.batch):
        for turn, first in enumerate(range(0, len(prompts) - rows + 1, rows)):
            part = prompts[first : first + rows]
            for system in in_turn(systems, turn):
                about = {"id": f"{system.name}, {rows}, {first}", "system": system.name, "rows": rows, "first": first}
                record = log.results(about["id"])
                if record is None:
                    one = ask(connections[system.name], part, 1)["seconds"] if rows == 1 else None
                    answer = ask(connections[system.name], part, options.max_new_tokens)
                    record = log.append({**about, "prefill": one, **answer})
                records.append(record)
            print(f"{rows} at once: {first + rows}/{len(prompts)}", flush=True)
    for connection, process in zip(connections.values(), processes, strict=True):
        connection.send(None)
        process.join()
    return records


def decode_time(records: Sequence[dict[str, Any]]) -> str:
    """Milliseconds of each token after the first, in a cell of a table; of records whose prefill was measured."""
    seconds = sum(record["seconds"] - record["prefill"] for record in records)
    tokens = sum(len(ids) - 1 for record in records for ids in record["ids"])
    return f"{1000 * seconds / tokens:.1f}" if tokens else "–"


def summarise(
    records: Sequence[dict[str, Any]], systems: Sequence[str], asked: Sequence[Question], namer: Namer
) -> list[str]:
    """A table for each size of batch: speed, and the quality of the same answers.

    Args:
        records: from `measure`.
        systems: names in the order of the lines; plain vLLM, which others are compared with, is the first.
        asked: the questions.
        namer: finds what descriptions name.
    """
    sections = []
    for rows in dict.fromkeys(record["rows"] for record in records):
        of_size = [record for record in records if record["rows"] == rows]
        plain = {record["first"]: record["ids"] for record in of_size if record["system"] == PLAIN}
        lines, speed = [], {}
        for name in (name for name in systems if any(record["system"] == name for record in of_size)):
            of_system = [record for record in of_size if record["system"] == name]
            tokens = sum(len(ids) for record in of_system for ids in record["ids"])
            speed[name] = tokens / sum(record["seconds"] for record in of_system)
            texts = [(record["first"] + at, text) for record in of_system for at, text in enumerate(record["texts"])]
            worth = quality([score(asked[number], text, namer) for number, text in texts])
            drafts, accepted = (sum(record[key] for record in of_system) for key in ("drafts", "accepted"))
            single = [record for record in of_system if record["prefill"] is not None]
            prefill = 1000 * statistics.median(record["prefill"] for record in single) if single else None
            same = sum(
                one == other
                for record in of_system
                for one, other in zip(record["ids"], plain.get(record["first"], []), strict=False)
            )
            lines.append(
                [
                    name,
                    f"{speed[name]:.1f}",
                    f"{speed[name] / speed[PLAIN]:.2f}" if PLAIN in speed else "–",
                    "–" if prefill is None else f"{prefill:.0f}",
                    decode_time(single),
                    f"{accepted / drafts:.2f}" if drafts else "–",
                    f"{tokens / len(texts):.0f}",
                    *(percent(share) for share in (worth.recall, worth.precision, worth.read)),
                    f"{same}/{len(texts)}" if plain else "–",
                ]
            )
        sections += [f"## {rows} at once", table(COLUMNS, lines)]
    return [*sections, NOTE]


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    systems, prompts, asked, namer = prepare(options)
    records = measure(options, systems, prompts)
    settings = {
        **{name: str(value) for name, value in asdict(options).items() if name not in ("questions", "output")},
        **machine(options.device),
    }
    command = f"python -m recipes.vllm_bench --questions {options.questions} --output {options.output}"
    report = page(
        "Twigs in vLLM", command, settings, summarise(records, [system.name for system in systems], asked, namer)
    )
    (options.output / "report.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main(tyro.cli(Options))
