"""What stands on docs/results/serving.md below its first heading, from the figures of `recipes.serving_bench`."""

from typing import Any


def sections(found: dict[str, Any]) -> list[str]:
    """Load, soak and faults, each with its heading.

    Args:
        found: figures by the name of what was measured; what was not measured is left out.
    """
    parts = []
    if "load" in found:
        parts += [
            "## Load",
            "Streams of clients that ask one question after another.",
            _load(found["load"], found.get("baseline")),
        ]
    if "turns" in found:
        parts += ["## Conversations", *_turns(found["turns"])]
    if "soak" in found:
        soak = found["soak"]
        parts += ["## Soak", (
            f"{soak['requests']:,} requests of 16 clients in mixed settings: {soak['failed']} failed. Of {soak['sampled']} "
            f"that were asked again one at a time, {soak['equal']} got the same answer. "
            "Resident memory of the server after each tenth: "
            f"{', '.join(f'{value:.0f}' for value in soak['megabytes'])} MB."
        )]  # fmt: skip
    faults = []
    if "hostile" in found:
        hostile = found["hostile"]
        faults.append(
            f"- {hostile['requests']:,} malformed and hostile requests to a server with a tiny model, by status: "
            + ", ".join(f"{status}: {count:,}" for status, count in hostile["statuses"].items())
            + ". Resident memory after a tenth and at the end: "
            + " and ".join(f"{value:.0f}" for value in hostile["megabytes"])
            + " MB."
        )
    if "terminate" in found:
        ended = found["terminate"]
        faults.append(
            f"- SIGTERM while 16 clients asked {ended['requests']} questions: {ended['whole']} answers came whole, "
            f"{ended['cut off']} were cut off, {ended['refused']} requests were refused; the server ended after "
            f"{ended['seconds']:.1f} s."
        )
    if "kills" in found:
        kills = found["kills"]
        faults.append(
            f"- `twigvlm batch` was killed {kills['kills']} times by kill -9: of {kills['requests']:,} requests {kills['lost']} "
            f"were lost and {kills['repeated']} have two results."
        )
    if faults:
        parts += ["## Faults", "\n".join(faults)]
    return parts


def _turns(found: dict[str, Any]) -> list[str]:
    ways = found["ways"]
    turns = len(next(iter(ways.values()))["first"])
    lines = [
        f"| | {' | '.join(f'turn {number + 1}, s' for number in range(turns))} | exact |",
        f"|---|{'---|' * (turns + 1)}",
        *(
            f"| {name} | {' | '.join(f'{first:.2f}' for first in way['first'])} | {way['right']:.1f} |"
            for name, way in ways.items()
        ),
    ]
    says = (
        f"{found['conversations']} conversations of {turns} short questions about one picture, pruned to R̄ = 64 with chains, "
        "one request at a time; servers with and without a prefix cache take turns. Seconds to the first token, medians. "
        f"{found['same']} of {found['answers']} answers are the same."
    )
    return [says, "\n".join(lines)]


def _load(rows: list[dict[str, Any]], single: dict[str, Any] | None) -> str:
    lines = [
        "| setting | clients | failed | requests/s | tokens/s | × one at a time | first token p50, p95 in s "
        "| exact | objects | texts |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    base = None
    if single is not None:
        base = single["tokens"] / single["seconds"]
        speed = f"{single['requests'] / single['seconds']:.2f} | {base:.1f} | 1"
        lines.append(
            f"| Hugging Face `generate`, one at a time | – | 0 | {speed} | – | {_quality(single['quality'])} |"
        )
    for row in rows:
        speed = row["tokens"] / row["seconds"]
        lines.append(
            f"| {row['setting']} | {row['clients']} | {row['failed']} | {row['requests'] / row['seconds']:.2f} | {speed:.1f} | "
            f"{'–' if base is None else f'{speed / base:.2f}'} | {row['first p50']:.2f}, {row['first p95']:.2f} | "
            f"{_quality(row['quality'])} |"
        )
    return "\n".join(lines)


def _quality(found: dict[str, float]) -> str:
    return (
        f"{found['exact']:.1f} | {found['objects recall']:.1f}/{found['objects precision']:.1f} | {found['texts']:.1f}"
    )
