"""`twigvlm figures attention` and `drafts`: figures that ask a twig a few questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twigvlm.cli.options import ModelOptions
from twigvlm.config import PruningConfig, Speculate
from twigvlm.errors import TwigVLMError

if TYPE_CHECKING:
    from twigvlm.cli.session import Session
    from twigvlm.evaluation.questions import Question


@dataclass(frozen=True, kw_only=True)
class _Asked(ModelOptions):
    """Options of both figures."""

    questions: Path
    """JSON file of questions with answers, as in `evaluate`."""
    kinds: tuple[str, ...] = ()
    """Kinds of questions to ask. None given: all."""
    limit: int = 3
    """Questions in the figure, the first ones."""

    def _chosen(self) -> tuple[Question, ...]:
        from twigvlm.evaluation.questions import load_questions

        return load_questions(self.questions).chosen(self.kinds, self.limit).items


@dataclass(frozen=True, kw_only=True)
class FigureAttention(_Asked):
    """What several rankings look at, side by side, a row per question (Fig. 5 and 8)."""

    deep_layer: int | None = None
    """Base layer, counted from 1, whose attention is shown beside the twig's. None: at 60 % of the depth."""
    out: Path = Path("attention.png")
    """Picture to write."""

    def run(self) -> None:
        """Ask and draw."""
        from twigvlm.cli.inspect import rankings
        from twigvlm.cli.output import check_picture_path
        from twigvlm.evaluation.figures import figure_class
        from twigvlm.evaluation.paper_figures import Seen, draw_maps
        from twigvlm.evaluation.variants import score_all
        from twigvlm.images import load_image
        from twigvlm.visualize import patch_grid, seen_box

        check_picture_path(self.out)
        figure_class()
        questions, seen = self._chosen(), []
        session = _session(self, "chain")
        assert session.model is not None
        model, titles = session.model, rankings(session.model, self.deep_layer)
        for question, inputs in _asked(self, session, questions, "Ranking"):
            mask = model.base.visual_mask(inputs["input_ids"])
            grid = patch_grid(session.base, int(mask.sum()), inputs)
            if grid is None:
                raise TwigVLMError(
                    f"model {self.model!r}: its visual tokens form no grid to draw; choose a picture that becomes no tiles"
                )
            scores = score_all(model, inputs, list(titles))
            maps = {title: scores[method][mask].view(grid) for method, title in titles.items()}
            image = load_image(question.image)
            seen.append(Seen(image, question.prompt, maps, seen_box(session.processor, image)))
        draw_maps(seen, self.out)
        print(f"Figure: {self.out}")


@dataclass(frozen=True, kw_only=True)
class FigureDrafts(_Asked):
    """Answers whose tokens are coloured by who found them, the twig's draft or the base (Fig. 9)."""

    retain: float | None = None
    speculate: Speculate = "chain"
    max_new_tokens: int = 192
    """Longest answer, in tokens."""
    out: Path = Path("drafts.png")
    """Picture to write."""

    def run(self) -> None:
        """Ask and draw."""
        from twigvlm.cli.output import check_picture_path, write_picture
        from twigvlm.evaluation.paper_figures import Drafted, draw_drafts
        from twigvlm.evaluation.token_origins import origins, pieces

        check_picture_path(self.out)
        if self.speculate == "none":
            raise TwigVLMError("speculate='none': nothing would be drafted; choose chain, tree or auto")
        if self.max_new_tokens < 1:
            raise TwigVLMError(f"max_new_tokens={self.max_new_tokens}: must be 1 or more")
        questions, answers = self._chosen(), []
        session = _session(self, self.speculate, PruningConfig(self.retain))
        assert session.model is not None
        options = {**session.config.generate_options, "max_new_tokens": self.max_new_tokens, "do_sample": False}
        for question, inputs in _asked(self, session, questions, "Answering"):
            output: Any = session.model.generate(**inputs, **options, return_dict_in_generate=True)
            ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            whose = origins(output.accepted_lengths[0], len(ids))
            answers.append(Drafted(question.prompt, pieces(ids, session.processor.tokenizer.decode), whose))
        write_picture(draw_drafts(answers), self.out)
        print(f"Figure: {self.out}")


def _session(options: _Asked, speculate: Speculate, pruning: PruningConfig | None = None) -> Session:
    from twigvlm.cli.session import SessionConfig, open_session

    config = SessionConfig.resolve(options.model, options.twig, pruning or PruningConfig(), speculate)
    return open_session(config, options.dtype, options.device)


def _asked(
    options: _Asked, session: Session, questions: tuple[Question, ...], title: str
) -> Iterator[tuple[Question, dict[str, Any]]]:
    """Give each question with its inputs, and show progress."""
    from twigvlm.cli.output import steps
    from twigvlm.cli.session import build_inputs

    with steps(title, len(questions), last_line=False) as advance:
        for question in questions:
            yield question, build_inputs(session.base, session.processor, [question.image], [question.prompt])
            advance()
