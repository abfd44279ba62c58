"""The twigs that `recipes.sapling.ablations` trains: what each learns, from how much, and in what shape."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from twigvlm.config import TwigConfig
from twigvlm.training.options import Stage1Config, Stage2Config

TEACHER = tuple(range(15, 25))
WIPE, SHARE = 24, 0.15
BUDGETS = (192.0, 128.0, 64.0, 48.0)
TWIG = TwigConfig(
    init="last", head="shared", draft_vocabulary=1024, final_wipe=WIPE, final_share=SHARE, pruning_head=True
)


@dataclass(frozen=True)
class Run:
    """A twig: trained in one stage, then asked under every budget."""

    stage: Stage1Config | Stage2Config
    samples: int
    """Conversations, each seen at most once; stage 2 takes of each the first question, where its answer is short."""
    start: str | None = None
    """The run that stage 2 starts from."""
    twig: TwigConfig = TWIG
    """Grown in stage 1."""
    budgets: tuple[float, ...] = BUDGETS


DISTILLED = {"alpha": 1.0, "temperature": 1.0}  # as published, L_PredKL stands at its clip here
NEXT_TOKENS = {"alpha": 0.0, "gamma": 0.0, "teacher_layers": None}
"""The losses of the first TwigVLM: L_NTP alone."""
MANY, FEW = 20000, 800  # conversations


def _stage1(samples: int, batch: int, rate: float = 1e-3, budgets: tuple[float, ...] = BUDGETS, **losses: Any) -> Run:
    stage = Stage1Config(batch_size=batch, learning_rate=rate, **{"teacher_layers": TEACHER, **losses})
    return Run(stage, samples, budgets=budgets)


def _few(**losses: Any) -> Run:
    """Of the runs that differ from *few* in one thing each; of the shape that ships."""
    return _shaped(_stage1(FEW, 8, budgets=(64.0,), **losses), trunk_layers=1)


def _shaped(run: Run, **shape: Any) -> Run:
    """With a twig of another shape."""
    return dataclasses.replace(run, twig=dataclasses.replace(run.twig, **shape))


def _first(run: Run, **shape: Any) -> Run:
    """As the first TwigVLM: it learns next tokens alone, and its last layer's attention ranks."""
    return _shaped(run, pruning_head=False, **shape)


def _stage2(start: str, samples: int = 1200, **options: Any) -> Run:
    rewards = {
        "batch_size": 8,
        "learning_rate": 1e-3,
        "group": 16,
        "budgets": (64,),
        "beta": 0.0,
        "gamma": (0.0, 0.0),
    }
    stage = Stage2Config(**{**rewards, **options})
    run = RUNS[start]
    return Run(stage, samples, start, run.twig, run.budgets)


RUNS = {
    "first": _first(_stage1(MANY, 16, **NEXT_TOKENS)),
    "first-next": _first(_stage1(12000, 16, 5e-4, **NEXT_TOKENS), init="next"),
    "distilled": _stage1(MANY, 16, **DISTILLED),
    "distilled-slow": _stage1(MANY, 16, 5e-4, **DISTILLED),
    "distilled-K1": _shaped(_stage1(MANY, 16, **DISTILLED), trunk_layers=1),
    "distilled-K1-answers": _shaped(_stage1(MANY, 16, gamma_answers=1.0, **DISTILLED), trunk_layers=1),
    "few": _few(**DISTILLED),
    "few-first": _first(_few(**NEXT_TOKENS)),
    "few-attention": _few(alpha=0.0),
    "few-answers": _few(gamma_answers=1.0, **DISTILLED),
    "few-published": _few(),
    **{f"T{layers}": _shaped(_few(**DISTILLED), twig_layers=layers) for layers in (1, 2, 4)},
    **{f"K{layers}": _shaped(_few(**DISTILLED), trunk_layers=layers) for layers in (0, 2, 3)},
    "init-next": _shaped(_few(**DISTILLED), init="next"),
    "init-random": _shaped(_few(**DISTILLED), init="random"),
}
RUNS |= {
    "distilled-rl": _stage2("distilled"),
    "distilled-K1-rl": _stage2("distilled-K1", budgets=(48,)),
    "distilled-rl-192": _stage2("distilled", budgets=(192,)),
    "distilled-rl-dynamic": _stage2("distilled", budgets=(48, 64, 96)),
    "distilled-rl-dynamic-400": _stage2("distilled", 400, budgets=(48, 64, 96)),
    "few-rl": _stage2("few", 200),
    "few-rl-400": _stage2("few", 400),
    "few-rl-192": _stage2("few", 200, budgets=(192,)),
    "few-rl-dynamic": _stage2("few", 200, budgets=(64, 85, 107, 128, 149, 171, 192), beta=8.0),
}
