"""Draw the paper's figures from raw results, or from answers to a few questions. Most of them need matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from twigvlm.evaluation.figures import figure_class, legend_height, percent_and_error, show_scores
from twigvlm.evaluation.report import quality_cell
from twigvlm.evaluation.summary import Accuracy, Speed
from twigvlm.evaluation.token_origins import Origin

DRAFTED, CHOSEN = (201, 236, 208), (255, 217, 168)
"""RGB colours of tokens that the twig drafted, and of those that the base chose."""


def draw_times(speeds: Mapping[str, Speed], lengths: Sequence[int], path: Path) -> None:
    """Draw seconds of prefill and decoding by answer length, a bar per system, with the quality of its answers (Fig. 3).

    Args:
        speeds: measured speed by the label of the bar; other lengths are extrapolated at the same time per token.
        lengths: lengths of answers to show, in tokens.
        path: path of the picture.
    """
    size = 1.5 + 0.35 * (len(speeds) + 1) * len(lengths), max(4, legend_height(2 * len(speeds)))
    figure = figure_class()(figsize=size, layout="constrained")
    axes = figure.subplots()
    for number, (label, speed) in enumerate(speeds.items()):
        per_token = speed.decode / max(1.0, speed.tokens - 1)
        at = [index * (len(speeds) + 1) + number for index in range(len(lengths))]
        axes.bar(
            at, [speed.prefill] * len(lengths), color=f"C{number}", label=f"{label}: prefill ({quality_cell(speed)} %)"
        )
        axes.bar(
            at,
            [per_token * (length - 1) for length in lengths],
            bottom=[speed.prefill] * len(lengths),
            color=f"C{number}",
            alpha=0.45,
            label=f"{label}: decoding",
        )
    middle = (len(speeds) - 1) / 2
    axes.set_xticks([index * (len(speeds) + 1) + middle for index in range(len(lengths))], [str(n) for n in lengths])
    axes.set(xlabel="new tokens of an answer", ylabel="seconds")
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=150)


def draw_speeds(groups: Mapping[str, Sequence[Speed]], path: Path) -> None:
    """Draw the RelSpd of every system in percent, with its interval and the quality of its answers; a panel per group (Fig. 6).

    Args:
        groups: speeds by title of the panel, for example short and long answers.
        path: path of the picture.
    """
    tallest = max(map(len, groups.values()))
    figure = figure_class()(figsize=(6 * len(groups), 1.2 + 0.45 * tallest), layout="constrained")
    for axes, (title, speeds) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        positions = range(len(speeds))
        length, error = percent_and_error(speeds)
        axes.barh(positions, length, xerr=error, color="C0", capsize=3)
        axes.set_yticks(positions, [f"{one.name}\n{quality_cell(one)} %" for one in speeds], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(100, color="grey", linewidth=0.8)
        axes.set(title=title, xlabel="tokens per second, % of the base's (RelSpd)")
    figure.savefig(path, dpi=150)


def draw_samples(by_samples: Mapping[int, Sequence[Accuracy]], names: Sequence[str], path: Path) -> None:
    """Draw RelAcc in percent over the number of training samples, a line per variant (Fig. 7).

    Args:
        by_samples: accuracies of a twig by the number of samples that it was trained on.
        names: names of the variants to draw.
        path: path of the picture.
    """
    figure = figure_class()(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    counts = sorted(by_samples)
    for name in names:
        points = [next(one for one in by_samples[count] if one.name == name) for count in counts]
        middle, error = percent_and_error(points)
        axes.errorbar(counts, middle, yerr=error, marker="o", capsize=3, label=name)
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.set(xlabel="training samples", ylabel="RelAcc, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


class Seen(NamedTuple):
    """A picture with a question, and the scores of its patches by several rankings."""

    image: Image.Image
    """The picture."""
    question: str
    """The text of the question."""
    maps: Mapping[str, Float[Tensor, "rows columns"]]
    """Scores [rows, columns] by title; all pictures of a figure have the same titles."""
    box: tuple[int, int, int, int] | None
    """The part of the picture (left, top, right, bottom) that the patches cover; None: all of it."""


def draw_maps(seen: Sequence[Seen], path: Path) -> None:
    """Draw pictures and the scores of their patches side by side, a row per question (Fig. 5 and 8).

    Args:
        seen: questions with the scores of their patches; at least one.
        path: path of the picture.
    """
    columns = 1 + len(seen[0].maps)
    figure = figure_class()(figsize=(3 * columns, 3.2 * len(seen)), layout="constrained")
    for row, one in zip(figure.subplots(len(seen), columns, squeeze=False), seen, strict=True):
        width, height = one.image.size
        row[0].imshow(one.image, extent=(0, width, height, 0))
        row[0].set_title(one.question, fontsize=9, wrap=True)
        for axes, (title, scores) in zip(row[1:], one.maps.items(), strict=True):
            axes.imshow(one.image.convert("L").convert("RGB"), extent=(0, width, height, 0))
            show_scores(axes, one.image, scores, one.box)
            axes.set_title(title, fontsize=9)
        for axes in row:
            axes.set(xlim=(0, width), ylim=(height, 0))
            axes.set_axis_off()
    figure.savefig(path, dpi=120)


class Drafted(NamedTuple):
    """An answer, token by token."""

    question: str
    """The text of the question."""
    pieces: Sequence[str]
    """The text that each token adds, from `token_origins.pieces`."""
    origins: Sequence[Origin]
    """Where each token came from, from `token_origins.origins`."""


def draw_drafts(answers: Sequence[Drafted], width: int = 1000) -> Image.Image:
    """Draw answers with drafted tokens in green and the base's own in orange (Fig. 9).

    Args:
        answers: answers with the text that each token adds.
        width: width of the picture, in pixels.
    """
    size = 18  # of the letters, in pixels
    font, line, margin = ImageFont.load_default(size), round(1.7 * size), size
    boxes: list[tuple[float, int, str, tuple[int, int, int] | None]] = []
    top = margin
    for answer in answers:
        boxes.append((margin, top, answer.question, None))
        left, top = float(margin), top + line
        for piece, origin in zip(answer.pieces, answer.origins, strict=True):
            parts = piece.split("\n")
            for number, part in enumerate(parts):
                long = font.getlength(part)
                if number or left + long > width - margin:
                    left, top = float(margin), top + line
                if part:
                    boxes.append((left, top, part, DRAFTED if origin.drafted else CHOSEN))
                left += long + 1
        top += 2 * line
    picture = Image.new("RGB", (width, top), "white")
    draw = ImageDraw.Draw(picture)
    for left, upper, text, colour in boxes:
        if colour is not None:
            draw.rectangle((left, upper, left + font.getlength(text), upper + round(1.35 * size)), fill=colour)
        draw.text((left, upper), text, fill="black", font=font)
    return picture
