"""Questions that `recipes.serving_bench` asks a server, and what the answers are worth."""

import base64
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from recipes.sapling.evaluate import LONG_ANSWER, SHORT_ANSWER, Tally
from recipes.sapling.pictures import render
from recipes.sapling.questions import evaluation_turns
from recipes.sapling.scenes import Scene, make_scene
from recipes.sapling.turns import Turn


@dataclass(frozen=True)
class Ask:
    """A question about a scene."""

    scene: Scene
    turn: Turn
    uri: str

    @property
    def length(self) -> int:
        """Largest number of tokens of the answer."""
        return LONG_ANSWER if self.turn.kind == "description" else SHORT_ANSWER

    def body(self, **options: Any) -> dict[str, Any]:
        """The request to the server; `options` are its further fields."""
        parts = [{"type": "image_url", "image_url": {"url": self.uri}}, {"type": "text", "text": self.turn.question}]
        messages = [{"role": "user", "content": parts}]
        return {"model": "sapling", "messages": messages, "max_completion_tokens": self.length, **options}


def questions(count: int) -> list[Ask]:
    """Mixed: of each scene three short questions and a description."""
    found: list[Ask] = []
    index = 0
    while len(found) < count:
        scene = make_scene("test", 5000 + index)
        data = BytesIO()
        render(scene).save(data, "PNG")
        uri = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        turns = evaluation_turns(scene, 3)
        short = [turn for turn in turns if turn.kind != "description"][:3]
        found += [Ask(scene, turn, uri) for turn in [*short, *(t for t in turns if t.kind == "description")]]
        index += 1
    return found[:count]


def quality(asked: list[Ask], answers: list[str]) -> dict[str, float]:
    """Of short answers the share of exact ones, of descriptions what they name and quote, in percent."""
    tally = Tally()
    for ask, answer in zip(asked, answers, strict=True):
        if ask.turn.kind == "description":
            tally.description(ask.scene, answer)
        else:
            tally.exact(ask.turn, answer)
    return {
        "exact": 100 * sum(tally.right.values()) / max(1, sum(tally.asked.values())),
        "objects recall": 100 * tally.found / max(1, tally.present),
        "objects precision": 100 * tally.found / max(1, tally.claimed),
        "texts": 100 * tally.quoted / max(1, tally.written),
    }
