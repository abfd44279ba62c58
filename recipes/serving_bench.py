"""Load, soak and faults of `twigvlm serve` on Sapling, in float32; writes docs/results/serving.md.

python -m recipes.serving_bench baseline   # Hugging Face's generate, one question at a time
python -m recipes.serving_bench load       # 1, 4, 16 and 64 clients, four settings
python -m recipes.serving_bench turns      # conversations, with and without the prefix cache
python -m recipes.serving_bench soak       # 5,000 requests
python -m recipes.serving_bench hostile    # 10,000 malformed and hostile requests
python -m recipes.serving_bench terminate  # SIGTERM under the load of 16 clients
python -m recipes.serving_bench kills      # 50 times kill -9 of `twigvlm batch`
python -m recipes.serving_bench report     # the page, of what has been measured

Each keeps its figures in `--folder`; a stopped load test goes on. Measure on a machine that does nothing else.
"""

import http.client
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil
import tyro

from recipes.serving_client import serving, stream
from recipes.serving_questions import Ask, quality, questions
from recipes.serving_turns import TURNS, measure

CLIENTS = (1, 4, 16, 64)
SETTINGS: dict[str, dict[str, Any]] = {
    "no twig": {"speculate": "none", "retain": None},
    "chains, exact": {"speculate": "chain", "retain": None},
    "pruned to R̄ 64, chains": {"speculate": "chain", "retain": 64, "diverse": True},
    "the same, refocusing": {"speculate": "chain", "retain": 64, "diverse": True, "refocus": 0.7},
}


def baseline(folder: Path, count: int) -> None:
    """The base's own generate, one question at a time."""
    from twigvlm.inputs import build_inputs, user_turn
    from twigvlm.loading import load_base

    base, processor = load_base("sapling", "float32")
    asked = questions(count)

    def answer(ask: Ask) -> list[int]:
        inputs = build_inputs(processor, [[user_turn(ask.turn.question, ask.uri)]], base.device, base.dtype)
        output = base.generate(**inputs, max_new_tokens=ask.length, do_sample=False)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    answer(asked[0])
    start = time.perf_counter()
    ids = [answer(ask) for ask in asked]
    seconds = time.perf_counter() - start
    texts = [processor.tokenizer.decode(each, skip_special_tokens=True) for each in ids]
    keep(folder, "baseline", {
        "requests": count, "seconds": seconds, "tokens": sum(map(len, ids)), "quality": quality(asked, texts),
    })  # fmt: skip


def load(folder: Path, count: int) -> None:
    """Clients that ask one question after another, for each setting and number of clients."""
    kept = folder / "load.json"
    found: list[dict[str, Any]] = json.loads(kept.read_text())["figures"] if kept.exists() else []
    # Figures of another number of questions cannot stand beside these.
    found = [row for row in found if row["requests"] == count]
    done = {(row["setting"], row["clients"]) for row in found}
    asked = questions(count)
    with serving("--waiting-seconds", "600") as (address, process):
        for name, options in SETTINGS.items():
            stream(address, asked[0].body(**options))
            for clients in CLIENTS:
                if (name, clients) in done:
                    continue
                start = time.perf_counter()
                with ThreadPoolExecutor(clients) as pool:
                    results = list(pool.map(lambda ask, o=options: stream(address, ask.body(**o)), asked))
                seconds = time.perf_counter() - start
                good = [result for result in results if not result.error]
                if not good:
                    raise SystemExit(f"{name}, {clients} clients: every request failed ({results[0].error})")
                first = sorted(result.first for result in good)
                found.append({
                    "setting": name, "clients": clients, "requests": count, "failed": count - len(good), "seconds": seconds,
                    "tokens": sum(result.tokens for result in good), "first p50": statistics.median(first),
                    "first p95": first[int(0.95 * (len(first) - 1))], "megabytes": process.memory_info().rss / 1e6,
                    "quality": quality(asked, [result.text for result in results]),
                })  # fmt: skip
                found.sort(key=lambda row: (list(SETTINGS).index(row["setting"]), row["clients"]))
                keep(folder, "load", found)


def turns(folder: Path, count: int) -> None:
    """Conversations of three short questions about a picture, pruned and drafted."""
    asked, options = questions(4 * (count + 1)), SETTINGS["pruned to R̄ 64, chains"]
    about = [asked[start : start + TURNS] for start in range(0, len(asked), 4)]
    keep(folder, "turns", measure([[(ask.body(**options), ask.turn) for ask in some] for some in about]))


def soak(folder: Path, count: int) -> None:
    """Many requests of 16 clients; after each tenth the memory, and 20 answers asked for again, one at a time."""
    asked, draw = questions(400), random.Random(0)
    settings = list(SETTINGS.values())
    found: dict[str, Any] = {"requests": 0, "failed": 0, "sampled": 0, "equal": 0, "megabytes": []}
    with serving() as (address, process):
        for tenth in range(10):
            size = (tenth + 1) * count // 10 - tenth * count // 10
            bodies = [draw.choice(asked).body(**draw.choice(settings)) for _ in range(size)]
            with ThreadPoolExecutor(16) as pool:
                results = list(pool.map(lambda body: stream(address, body), bodies))
            found["megabytes"].append(process.memory_info().rss / 1e6)
            found["requests"] += size
            found["failed"] += sum(bool(result.error) for result in results)
            for at in draw.sample(range(size), min(20, size)):
                found["sampled"] += 1
                found["equal"] += stream(address, bodies[at]).text == results[at].text
            keep(folder, "soak", found)  # what was measured by then is not lost with the rest


def hostile_requests(folder: Path, count: int) -> None:
    """Malformed and hostile requests, on a tiny model."""
    from tests.serving import hostile
    from tests.serving.servers import served, tiny_service

    statuses: dict[str, int] = {}
    process = psutil.Process()
    with served(tiny_service()) as address:
        parts = urlsplit(address)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        before = 0.0
        for seed in range(count):
            try:
                status = str(hostile.send(connection, seed))
            except (http.client.HTTPException, OSError):
                connection.close()
                status = "hung up"
            statuses[status] = statuses.get(status, 0) + 1
            if seed == count // 10:
                before = process.memory_info().rss / 1e6
        after = process.memory_info().rss / 1e6
    keep(folder, "hostile", {
        "requests": count, "statuses": dict(sorted(statuses.items())), "megabytes": [before, after],
    })  # fmt: skip


def terminate(folder: Path, count: int) -> None:
    """SIGTERM while 16 clients ask one question after another: every answer is whole, or refused before it began."""
    asked = questions(count)
    with serving() as (address, process):
        stream(address, asked[0].body())
        with ThreadPoolExecutor(16) as pool:
            futures = [pool.submit(stream, address, ask.body(**SETTINGS["pruned to R̄ 64, chains"])) for ask in asked]
            while sum(future.done() for future in futures) < count // 4:
                time.sleep(0.1)
            start = time.perf_counter()
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=120)
            seconds = time.perf_counter() - start
    results = [future.result() for future in futures]
    whole = sum(not result.error for result in results)
    begun = sum(bool(result.first) for result in results)
    keep(folder, "terminate", {
        "requests": count, "whole": whole, "cut off": begun - whole, "refused": count - begun, "seconds": seconds,
    })  # fmt: skip


def kills(folder: Path, count: int) -> None:
    """kill -9 of `twigvlm batch`, at random times, until that many kills were survived; then the run ends."""
    asked, draw = questions(8 * count), random.Random(0)
    source, out = folder / "batch.jsonl", folder / "results.jsonl"
    out.unlink(missing_ok=True)
    records = [{"custom_id": f"r{n}", "body": ask.body(retain=64)} for n, ask in enumerate(asked)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = [sys.executable, "-m", "twigvlm", "batch", str(source), str(out), "--dtype", "float32"]

    def size() -> int:
        return out.stat().st_size if out.exists() else 0

    done = 0
    for _ in range(count):
        process, before = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL), size()
        while size() == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.random() * 2)
        done += process.poll() is None
        process.kill()
        process.wait()
    subprocess.run(command, check=True)
    ids = [json.loads(line)["custom_id"] for line in out.read_text().splitlines()]
    keep(folder, "kills", {
        "kills": done, "requests": len(records), "results": len(ids), "repeated": len(ids) - len(set(ids)),
        "lost": len(records) - len(set(ids)),
    })  # fmt: skip


def keep(folder: Path, name: str, figures: Any) -> None:
    """Keep figures in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"cores": os.cpu_count(), "load": os.getloadavg()}
    (folder / f"{name}.json").write_text(json.dumps({"figures": figures, "machine": machine}, indent=1))
    print(f"{name}: {json.dumps(figures)}")


def report(folder: Path) -> None:
    """Write the page from what was measured; what it says above its first heading stays."""
    from recipes.sapling.results import wrapped, write
    from recipes.serving_report import sections

    found = {path.stem: json.loads(path.read_text())["figures"] for path in sorted(folder.glob("*.json"))}
    write("serving", [wrapped(section) for section in sections(found)])


@dataclass(frozen=True)
class Options:
    """What to measure, and how much of it."""

    what: tyro.conf.Positional[Literal["baseline", "load", "turns", "soak", "hostile", "terminate", "kills", "report"]]
    folder: Path = Path("runs/serving")
    """Where figures are kept."""
    count: int | None = None
    """Requests, conversations or kills. None: 128 of baseline, load and terminate, 40 conversations, 5,000 of the soak, 10,000
    hostile ones, 50 kills."""


def main(options: Options) -> None:
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.what == "report":
        report(options.folder)
        return
    work, count = {
        "baseline": (baseline, 128), "load": (load, 128), "turns": (turns, 40), "soak": (soak, 5000),
        "hostile": (hostile_requests, 10_000), "terminate": (terminate, 128), "kills": (kills, 50),
    }[options.what]  # fmt: skip
    work(options.folder, options.count or count)


if __name__ == "__main__":
    main(tyro.cli(Options))
