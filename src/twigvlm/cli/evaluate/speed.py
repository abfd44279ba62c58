"""`twigvlm evaluate speed`: tokens per second of the twig's parts, alone and together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from twigvlm.cli.evaluate.options import BaselineOptions, TimingOptions
from twigvlm.config import SpeculationConfig

if TYPE_CHECKING:
    from twigvlm.evaluation.systems import System


@dataclass(frozen=True, kw_only=True)
class EvaluateSpeed(BaselineOptions):
    """Tokens per second of the base's own `generate` and of the twig's parts."""

    name: ClassVar[str] = "evaluate speed"

    draft_length: int = SpeculationConfig.draft_length
    draft_threshold: float = SpeculationConfig.draft_threshold
    tree_depth: int = SpeculationConfig.tree_depth
    tree_width: int = SpeculationConfig.tree_width
    tree_expand: int = SpeculationConfig.tree_expand
    tree_nodes: int = SpeculationConfig.tree_nodes
    systems: tuple[str, ...] = ()
    """What to time in addition to the baselines: "own loop", which neither prunes nor drafts; a way to draft, one of chain,
    tree, auto, lookup and exit; a pruning method of `twigvlm methods`; both, as in "twig + chain" or
    "diverse+refocus:0.7 + auto"; "HF prompt lookup", and with assistant "HF assistant". None given: those
    of HF, own loop, all ways to draft, twig alone and with each of them but exit, diverse, and diverse + auto."""
    assistant: str | None = None
    """Small vision-language model of the base's vocabulary, a Hugging Face id or a directory, which drafts for the base's own
    `generate`. None: there is no system "HF assistant"."""
    lookup_ngram: int = SpeculationConfig.lookup_ngram

    def run(self) -> None:
        """Measure, and write results.jsonl and report.md."""
        from twigvlm.evaluation.systems import drafting_ways, named_systems

        self.check("baselines")
        chain: dict[str, Any] = {"draft_length": self.draft_length, "draft_threshold": self.draft_threshold}
        tree: dict[str, Any] = {
            name: getattr(self, name) for name in ("tree_depth", "tree_width", "tree_expand", "tree_nodes")
        }
        SpeculationConfig("chain", **chain)  # for their errors
        SpeculationConfig("tree", **tree)
        ways = drafting_ways(chain, tree, self.lookup_ngram)
        systems = named_systems(self.systems, self.retain, ways, self.baselines, self.assistant is not None)
        time_systems(self, "Speed", systems, assistant=self.assistant)


def time_systems(
    options: TimingOptions,
    title: str,
    systems: Sequence[System],
    validation: str = "",
    assistant: str | None = None,
) -> None:
    """Time every system on every prompt, and write results and report.

    Args:
        options: options of the command.
        title: title of the report.
        systems: systems to time.
        validation: what the evaluation is used to choose, so that the test split is refused; empty: nothing is chosen.
        assistant: small model that drafts for the base's own `generate`; None: none.
    """
    from twigvlm.cli.evaluate.bench import machine, open_bench, open_log, showing, write_report
    from twigvlm.evaluation.methods import parse_methods
    from twigvlm.evaluation.report import speed_sections
    from twigvlm.evaluation.results_log import answered
    from twigvlm.evaluation.speed import check_attentions, run_speed

    bench = open_bench(options, validation, any(system.needs_twig for system in systems))
    check_attentions(bench.base, (system.attention for system in systems))
    drafter = None if assistant is None else bench.load_assistant(assistant, options)
    model = bench.grow(exits=any(system.options.get("speculate") == "exit" for system in systems))
    parse_methods(model, list(dict.fromkeys(system.method for system in systems)))  # for its errors
    more = {"repeats": options.repeats, **machine(), **({} if assistant is None else {"assistant": assistant})}
    described = [dataclasses.asdict(system) for system in systems]
    log = open_log(options, {**bench.settings, **more, "systems": described}, [system.method for system in systems])
    questions = bench.questions.items
    with showing(title, (question.id for question in questions), log) as show:
        records = run_speed(
            model,
            bench.processor.tokenizer,
            bench.questions,
            systems,
            bench.inputs_of,
            log,
            options.max_new_tokens,
            options.max_description_tokens,
            options.repeats,
            show,
            assistant=drafter,
        )
    write_report(options, title, bench, more, speed_sections(answered(records), systems), records)
