import math

import pytest

from twigvlm.evaluation.figures import draw_accuracy
from twigvlm.evaluation.metrics import FEWEST
from twigvlm.evaluation.report import accuracy_sections, exactness_sections, page, speed_sections
from twigvlm.evaluation.summary import accuracies, compare_speeds, faster
from twigvlm.evaluation.systems import System
from twigvlm.evaluation.variants import NONE, Variant

VARIANTS = [
    NONE,
    Variant("twig", 10.0, 5),
    Variant("twig", 7.0, 5),
    Variant("random", 10.0, 5),
    Variant("random", 7.0, 5),
]


def records():
    right = {"none": 1110, "twig@10/5": 1100, "twig@7/5": 1010, "random@10/5": 1000, "random@7/5": 0}
    rows = []
    for place, kind in enumerate(["place", "place", "count", "count"]):
        score = {name: int(f"{digits:04d}"[place]) for name, digits in right.items()}
        kept = {name: {"none": 16}.get(name, 9 if "10" in name else 3) for name in right}
        more = {"kept": kept, "average": kept, "ran": dict.fromkeys(kept, 0)}
        rows.append({"id": str(place), "picture": "a", "kind": kind, "score": score, **more})
    found = {name: [min(2, index), 2, 2, index, 5] for index, name in enumerate(reversed(right))}
    more = {"kept": rows[0]["kept"], "average": rows[0]["kept"], "ran": dict.fromkeys(found, 7)}
    rows.append({"id": "d", "picture": "a", "kind": "description", "score": found, **more})
    return rows


def test_accuracies():
    figures = {one.name: one for one in accuracies(records())}
    base, twig = figures["none"], figures["twig@10/5"]
    assert (base.exact, base.relative, base.kept) == (0.75, 1, 16)
    assert twig.exact == 0.5
    assert twig.relative == pytest.approx(2 / 3)
    assert math.isnan(twig.interval[0]), "four questions have no interval"
    assert twig.kinds == {"count": (2, 0.0), "place": (2, 1.0)}
    assert (figures["random@10/5"].recall, figures["random@7/5"].precision) == (0.5, 0)
    assert (figures["random@10/5"].read, base.read, base.ran) == (0.2, 0.8, 1.4)
    only_descriptions = accuracies(records()[4:])
    assert math.isnan(only_descriptions[0].exact)


def test_accuracy_report():
    text = page("Accuracy", "twigvlm …", {"dtype": "float32"}, accuracy_sections(accuracies(records()), VARIANTS))
    assert "| dtype | float32 |" in text
    assert "**75.0 %** at 16 visual tokens" in text
    assert "| method | K_f | φ | R̄ 10: exact · RelAcc · R | R̄ 7: exact · RelAcc · R |" in text
    assert "| twig | 5 | 0 | 50.0 · 66.7 · R 9 |" in text
    assert "| random | 5 | 0 | 25.0 · 33.3 · R 9 |" in text
    assert "| pruning | count (2) | place (2) |" in text
    assert "| none | 50.0 | 100.0 |" in text
    assert "| twig, R̄ 10, K_f 5 | 0.0 | 100.0 |" in text
    assert "| random, R̄ 10, K_f 5 | 50.0 | 50.0 | 20.0 | 1 |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| random, R̄ 10")}
    assert widths == {4, 6}


def test_what_refocusing_costs_is_in_tokens_and_in_steps():
    rows = [
        {**row, "looks": {**dict.fromkeys(row["ran"]), "twig@7/5": number}, "steps": dict.fromkeys(row["ran"], 8)}
        for number, row in enumerate(records())
    ]
    again = {one.name: one.again for one in accuracies(rows)}
    assert again.pop("twig@7/5") == (1 + 2 + 3 + 4) / 40
    assert all(map(math.isnan, again.values())), "they do not refocus"
    text = "\n".join(accuracy_sections(accuracies(rows), VARIANTS))
    assert "| pruning | recall | precision | texts | chosen again | in steps, % |" in text
    assert "| 1 | 25.0 |" in next(
        line for line in text.splitlines() if line.startswith("| twig, R̄ 7, K_f 5 |") and "25" in line
    )
    assert "share of the steps" in text
    older = "\n".join(accuracy_sections(accuracies([*records()[:1], *rows[1:]]), VARIANTS))
    assert "in steps" not in older, "the first record does not say"
    assert "| pruning | recall | precision | texts | chosen again |\n" in older


@pytest.mark.parametrize("name", ["figure.png", "figure.svg"])
def test_figure(tmp_path, name):
    pytest.importorskip("matplotlib")
    draw_accuracy(accuracies(records()), VARIANTS, tmp_path / name)
    assert (tmp_path / name).stat().st_size > 5000


def test_the_figure_is_over_the_true_budgets(tmp_path, monkeypatch):
    axes, drawn = pytest.importorskip("matplotlib.axes").Axes, {}
    real = axes.errorbar

    def errorbar(self, x, y, **how):
        drawn[how["label"]] = x
        return real(self, x, y, **how)

    monkeypatch.setattr(axes, "errorbar", errorbar)
    draw_accuracy(accuracies(records()), VARIANTS, tmp_path / "figure.svg")
    assert drawn == {"twig": [3, 9], "random": [3, 9]}, "asked are 7 and 10"


def timed():
    def run(ids, prefill, total, draft=None, drafted=(), accepted=()):
        times = {"prefill": prefill, "total": total, "draft": [draft] * 3, "verify": [draft] * 3}
        return {"ids": ids, "score": int(ids == [1, 2]), "drafted": list(drafted), "accepted": list(accepted), **times}

    slow = {"prefill": [0.5] * 3, "total": [2.5] * 3}
    hf = {"prefill": [0.5, 0.1, 9.0], "total": [1.5, 2.0, 9.0]}
    return [
        {
            "id": "0",
            "runs": {
                "eager": run([1, 2], **slow),
                "sdpa": run([1, 2], **hf),
                "loop": run([1, 2], [0.25] * 3, [1.0] * 3, 0.25),
                "chain": run([1, 3], [0.25] * 3, [0.5] * 3, 0.1, [4, 2], [3, 0]),
            },
        }
    ]


SYSTEMS = [
    System("eager", "eager"),
    System("sdpa", "sdpa"),
    System("loop"),
    System("chain", same_as="loop"),
]


def test_speeds_are_medians_over_repeats():
    assert faster(timed(), ["eager", "sdpa"]) == "sdpa"
    figures = {one.name: one for one in compare_speeds(timed(), "sdpa", {one.name: one.same_as for one in SYSTEMS})}
    assert figures["sdpa"].speed == 1.0  # 2 tokens in a median of 2.0 s
    assert (figures["sdpa"].prefill, figures["sdpa"].decode) == (0.5, 1.5)
    chain = figures["chain"]
    assert (chain.relative, chain.relative_prefill) == (4.0, 2.0)
    assert (chain.acceptance, chain.accepted_length, chain.different) == (0.5, 1.5, 1)
    assert figures["loop"].different is None
    assert math.isnan(figures["loop"].acceptance)
    assert math.isnan(figures["sdpa"].draft)


def timed_pictures(count, prompts):
    """Prompts that take turns among the pictures; the speed of the loop depends on the picture."""
    rows = []
    for number in range(prompts):
        (row,) = timed()
        row["runs"]["loop"]["total"] = [1.0 + number % count / 10] * 3
        rows.append({**row, "id": str(number), "picture": str(number % count)})
    return rows


def test_intervals_of_speeds_are_over_pictures():
    def interval(rows):
        return compare_speeds(rows, "sdpa", {"loop": None})[0].interval

    low, high = alone = interval(timed_pictures(FEWEST, FEWEST))
    assert low < high
    assert interval(timed_pictures(FEWEST, 4 * FEWEST)) == pytest.approx(alone), "more prompts are no more pictures"
    assert math.isnan(interval(timed_pictures(FEWEST - 1, 4 * FEWEST))[0])
    older = [{name: row[name] for name in ("id", "runs")} for row in timed_pictures(FEWEST, 4 * FEWEST)]
    assert not math.isnan(interval(older)[0]), "raw results that do not say which picture"


def test_speed_report():
    text = "\n".join(speed_sections(timed(), SYSTEMS))
    assert "1 prompts, 3 alternating repeats" in text
    assert "**sdpa** (baseline) | 2.0 | 1.0 | 1.00 | exact 100.0 | 1.00 |" in text
    assert "| chain | 2.0 | 4.0 | 4.00 | exact 0.0 | 2.00 | 250.0 | 250.0 | 100.0 | 100.0 | 50.0 | 1.50 | 1 |" in text
    without = "\n".join(speed_sections(timed(), [SYSTEMS[2], SYSTEMS[3]]))
    assert "**loop** (baseline)" in without


def test_what_refocusing_costs_stands_beside_its_speed():
    (row,) = timed()
    row["runs"]["chain"]["looks"] = [[1, 3], [2, 4]]  # after how many tokens, and how many ran again
    row["runs"]["chain"] |= {"drafted": [4, 2, 0, 2, 0], "accepted": [3, 0, 0, 1, 0]}
    row["runs"]["loop"]["looks"] = None
    figures = {one.name: one for one in compare_speeds([row], "sdpa", {one.name: one.same_as for one in SYSTEMS})}
    assert (figures["chain"].ran, figures["chain"].again) == (7, 0.5)
    assert math.isnan(figures["loop"].ran)
    assert math.isnan(figures["sdpa"].again)
    text = "\n".join(speed_sections([row], SYSTEMS))
    assert "different outputs | chosen again | in steps, % |" in text
    lines = {line.split(" | ")[0]: line for line in text.splitlines()}
    assert lines["| chain"].endswith("| 1 | 7 | 50.0 |")
    assert lines["| loop"].endswith("| – | – | – |")
    assert "Chosen again: visual tokens that ran" in text
    assert "hosen again" not in "\n".join(speed_sections(timed(), SYSTEMS)), "older raw results do not say"


def test_exactness_report():
    rows = [{"id": str(i), "tokens": 5, "same": {"chain": i > 0, "no pruning": True}} for i in range(3)]
    text = "\n".join(exactness_sections(rows))
    assert "3 prompts, answers of 15 tokens" in text
    assert "unpruned | 2 of 3 |" in text
    assert "own generate | 3 of 3 |" in text
    assert "unpruned: 0" in text
