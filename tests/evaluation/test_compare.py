import math
from dataclasses import replace
from functools import cache

import pytest

from tests.tiny import prompt, tiny_llava
from twigvlm.config import TwigConfig
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.compare import (
    BASE,
    LOOP,
    Combination,
    checked_inputs,
    compare,
    make_combinations,
    timed_questions,
)
from twigvlm.evaluation.compare_report import comparison_sections
from twigvlm.evaluation.figures import draw_comparison
from twigvlm.evaluation.metrics import FEWEST
from twigvlm.evaluation.published import published
from twigvlm.evaluation.questions import Question
from twigvlm.evaluation.variants import NONE, Variant, make_variants
from twigvlm.model import TwigVLM

TWIG, FASTV, RANDOM = Variant("twig", 64, 24), Variant("fastv", 64), Variant("random:0", 64)
COMBINATIONS = make_combinations([NONE, TWIG, FASTV, RANDOM], ["none", "chain"])
SHORT, LONG = 12, 3


def question(number, long=False):
    return Question(str(number), f"{number}.png", "?", "a", "rows" if long else "place", long=long)


QUESTIONS = [question(number, number >= SHORT) for number in range(SHORT + LONG)]


def answers():
    """The base is right everywhere, FastV on every second question, the others on all but the first."""
    right = {
        "none": lambda n: 1,
        "twig@64/24": lambda n: n > 0,
        "fastv@64": lambda n: n % 2,
        "random:0@64": lambda n: n,
    }
    rows = []
    for number, one in enumerate(QUESTIONS):
        figures = {
            "kept": dict.fromkeys(right, 41),
            "average": {name: 576.0 if name == "none" else 63.5 + number % 2 for name in right},
            "ran": dict.fromkeys(right, 0),
            "given": dict.fromkeys(right, "as before"),
        }
        score = {name: int(bool(rule(number))) for name, rule in right.items()}
        rows.append({"id": one.id, "kind": one.kind, "long": one.long, "score": score, **figures})
    return rows


def timed():
    """Twig with chains: twice as fast in all, prefill four times; every prompt takes another time."""

    def run(scale, prefill, rest, peak, text="as before"):
        draft = {"drafted": [2], "accepted": [1], "draft": [0.1], "verify": [0.1]}
        seconds = {"prefill": [scale * prefill], "total": [scale * (prefill + rest)]}
        return {"ids": [1, 2, 3], "text": text, "score": 1, "peak": peak, **draft, **seconds}

    rows = []
    for number, scale in ((0, 1.0), (1, 100.0), (2, 3.0), (SHORT, 5.0)):
        runs = {name: run(scale, 2.0, 4.0, 9 * 2**20) for name in ("none + chain", "fastv@64", "random:0@64 + chain")}
        runs["fastv@64 + chain"] = run(scale, 2.0, 4.0, 9 * 2**20, "something else")
        runs["random:0@64"] = run(scale, 2.0, 4.0, 9 * 2**20, "something else")
        runs["own loop"] = run(scale, 2.0, 3.0, 9 * 2**20)
        runs["HF generate, sdpa"] = run(scale, 2.0, 4.0, 10 * 2**20)
        runs["HF generate, eager"] = run(scale, 3.0, 5.0, 12 * 2**20)
        runs["twig@64/24"] = run(scale, 0.5, 4.0, 8 * 2**20)
        runs["twig@64/24 + chain"] = run(scale, 0.5, 2.5, 8 * 2**20)
        rows.append({"id": str(number), "long": number >= SHORT, "runs": runs})
    return rows


@cache
def lines(times=True):
    found = compare(answers(), timed() if times else [], COMBINATIONS, ["eager", "sdpa"])
    return {line.combination.name: line for line in found}


def test_every_way_to_draft_goes_on_top_of_every_method():
    assert COMBINATIONS[0] == BASE
    assert [one.label for one in COMBINATIONS[1:5]] == ["own loop", "base + chain", "twig", "twig + chain"]
    drafted = [Combination(NONE, "chain"), Combination(FASTV, "chain")]
    assert make_combinations([NONE, FASTV], ["chain"]) == [BASE, LOOP, *drafted]
    assert make_combinations([NONE, FASTV], ["none", "chain"], timed=False) == [
        BASE,
        drafted[0],
        Combination(FASTV),
        drafted[1],
    ]


def test_quality_and_budget_are_those_of_the_same_pruning():
    found = lines()
    twig = found["twig@64/24 + chain"]
    assert twig.average == pytest.approx(64 - 0.5 / 15)
    assert twig.quality["short"].relative == pytest.approx(11 / 12)
    assert twig.quality["short"].interval[0] < 11 / 12 < twig.quality["short"].interval[1]
    assert twig.quality["long"].relative == 1
    assert found["none"].average == 576


def test_ratios_are_medians_over_questions_against_the_faster_base():
    found = lines()
    twig = found["twig@64/24 + chain"].times
    assert (twig["short"].relative, twig["short"].prefill, twig["short"].share) == (2, 4, 0.5)
    assert twig["short"].decode == pytest.approx(4 / 2.5)
    assert (twig["short"].count, twig["long"].count) == (3, 1)
    assert found["none"].times["short"].relative == 1
    assert found["none"].times["short"].speed.speed == pytest.approx((1 / 2 + 1 / 200 + 1 / 6) / 3)


def test_what_the_loop_itself_gains_is_shown_beside_the_methods():
    loop = lines()["own loop"]
    assert loop.times["short"].decode == pytest.approx(4 / 3)
    assert loop.quality["short"].relative == 1
    text = "\n\n".join(comparison_sections(list(lines().values()), pruning_head=True))
    assert "| own loop | – | 576.0 | exact 100.0 |" in text


def test_intervals_of_speeds_are_over_pictures():
    def interval(pictures):
        rows = [{**timed()[number % 3], "id": str(number), "picture": number % pictures} for number in range(SHORT)]
        line = next(
            line
            for line in compare(answers(), rows, COMBINATIONS, ["eager", "sdpa"])
            if line.combination == Combination(NONE, "chain")
        )
        return line.times["short"].interval

    assert math.isnan(interval(FEWEST - 1)[0])
    assert interval(FEWEST) == (1, 1)


def test_answers_that_differ_from_the_untimed_ones_are_counted():
    found = lines()
    assert found["fastv@64"].times["short"].different == 0
    assert found["fastv@64 + chain"].times["short"].different == 3
    assert found["random:0@64"].times["short"].different is None


def test_the_table_has_every_method_beside_its_published_figure():
    text = "\n\n".join(comparison_sections(list(lines().values()), pruning_head=True, figure="figure.png"))
    table = text.split("| method |")[1].split("\n\n")[0].splitlines()
    assert len(table) == 2 + len(COMBINATIONS)
    assert "R̄ asked | R̄ | short: quality, % | short: RelAcc, % | published, % |" in table[0]
    assert "long: speed ratio" in table[0]
    twig = next(row for row in table if row.startswith("| twig + chain |"))
    assert "| 64 | 64.0 | exact 91.7 | 91.7 [75.0, 100.0] | 97.7 |" in twig
    assert "| 2.00 | 4.00, 1.60 |" in twig
    assert twig.endswith("| 8 |")
    base = next(row for row in table if row.startswith("| **base** |"))
    assert "| – | 576.0 | exact 100.0 | 100.0 [100.0, 100.0] | – |" in base
    assert base.endswith("| 10 |")
    assert "| 77.0 |" in next(row for row in table if row.startswith("| fastv |"))
    assert "3 short and 1 long answers" in text
    assert "![RelAcc over visual tokens and over the time of an answer](figure.png)" in text
    details = text.split("## Timed short answers")[1].split("## Timed long answers")[0]
    assert "| twig + chain | 64 | exact 100.0 | 3.0 | 17333.3 | 43333.33 | 50.0 | 1.00 | 0 |" in details
    assert "nan" not in text


def test_tokens_that_were_chosen_again_are_shown_where_there_are_any():
    found = lines(times=False)
    twig = found["twig@64/24"]
    quality = replace(twig.quality["short"], ran=7.4)
    again = replace(twig, quality={"short": quality})
    table = "\n".join(comparison_sections([replace(found["none"], quality=again.quality), again], pruning_head=True))
    assert "short: chosen again |" in table
    assert "| 97.7 | 7 |" in table
    known = replace(again, quality={"short": replace(quality, again=0.125)})
    table = "\n".join(comparison_sections([replace(found["none"], quality=again.quality), known], pruning_head=True))
    assert "| 97.7 | 7, 12.5 % of steps |" in table
    assert "chosen again" not in "\n".join(comparison_sections(list(found.values()), pruning_head=True))


def test_without_times_there_are_no_times():
    found = lines(times=False)
    assert all(not line.times and math.isnan(line.peak) for line in found.values())
    text = "\n\n".join(comparison_sections(list(found.values()), pruning_head=True))
    assert "ratio" not in text
    assert "peak" not in text
    assert "| fastv | 64 |" in text


def test_published_figures_are_of_the_method_that_was_published():
    assert published(TWIG, pruning_head=True) == "97.7"
    assert published(TWIG, pruning_head=False) == published(Variant("attention", 64, 24), True) == "96.0"
    assert published(Variant("sparsevlm", 192), True) == "95.7 (R̄ 206.5)"
    for variant in (NONE, Variant("fastv", 48), Variant("fastervlm", 192), Variant("dart", 64), Variant("fastv:3", 64)):
        assert published(variant, True) == ""


@pytest.mark.parametrize(
    ("method", "figure"),
    [
        ("fastv:2", "77.0"),
        ("fastv:3", ""),
        ("pyramiddrop:compacted", "87.6"),
        ("mustdrop:compacted", "89.6 (counted after cuts)"),
        ("fastervlm:compacted", "89.1"),
        ("visionzip:compacted", "93.3"),
        ("visionzip:runs/projector", "95.2"),
        ("visionzip:runs/projector:compacted", "95.2"),
        ("sparsevlm:compacted", "89.9 (R̄ 82.2)"),
        ("sparsevlm:published:compacted", "89.9 (R̄ 82.2)"),
        ("sparsevlm-v2:compacted", ""),
        ("random:0", ""),
    ],
)
def test_published_figures_stand_beside_names_with_options_that_are_no_other_setting(method, figure):
    assert published(Variant(method, 64), True) == figure


@pytest.mark.parametrize("times", [True, False])
def test_figure(tmp_path, times):
    pytest.importorskip("matplotlib")
    draw_comparison(list(lines(times).values()), tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert len(drawn) > 5000


def test_the_figure_names_every_line_even_if_answers_of_one_length_have_no_times(tmp_path):
    pytest.importorskip("matplotlib")
    found = compare(answers(), timed()[3:], COMBINATIONS, ["eager", "sdpa"])
    draw_comparison(found, tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    for line in found:
        assert f"<!-- {line.combination.label} -->" in drawn


def test_the_legend_of_many_methods_fits(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    saved, save = [], figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda self, *args, **options: saved.append(self) or save(self, *args)
    )
    base, *_, last = lines(times=False).values()
    variants = [replace(last.combination.variant, method=f"deep:{layer}") for layer in range(80)]
    many = [replace(last, combination=replace(last.combination, variant=variant)) for variant in variants]
    draw_comparison([base, *many], tmp_path / "figure.svg")
    (legend,) = saved[0].legends
    assert len(legend.get_texts()) == 81
    assert legend.get_window_extent().y0 >= 0


def test_the_first_questions_of_each_length_are_timed():
    mixed = [question(0), question(1, True), question(2), question(3), question(4, True), question(5, True)]
    assert [one.id for one in timed_questions(mixed, 2)] == ["0", "1", "2", "4"]
    assert timed_questions(mixed, 0) == ()


def test_a_budget_that_no_prompt_can_have_is_refused_at_once_with_every_method_that_cannot():
    model = TwigVLM.grow(tiny_llava(), TwigConfig(2, 2, final_wipe=5))
    variants = make_variants(model, ["twig", "fastv", "divprune"], [4])
    with pytest.raises(TwigVLMError, match=r"method 'twig': retain=4: must be .*; method 'fastv': retain=4: must be"):
        checked_inputs(model, variants, [question(0)], lambda *some: prompt())


def test_a_prompt_that_cannot_have_the_budget_of_the_others_fails():
    model = TwigVLM.grow(tiny_llava(), TwigConfig(2, 2, final_wipe=5))
    longer, shorter = prompt(), prompt()
    shorter["input_ids"] = shorter["input_ids"][:, :12]  # 9 visual tokens
    inputs = {"0": longer, "1": shorter}
    inputs_of = checked_inputs(
        model, make_variants(model, ["divprune"], [10]), [question(0)], lambda one: inputs[one.id]
    )
    assert inputs_of(question(0)) is longer
    with pytest.raises(TwigVLMError, match="method 'divprune'"):
        inputs_of(question(1))
