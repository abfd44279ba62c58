"""The base's choice of tokens, greedy or sampled, after whatever logits processors the caller asked for."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from twigvlm.engine.row import Processors, Request, Row
from twigvlm.errors import TwigVLMError
from twigvlm.speculation.walk import Choose

_NOTHING = -1  # in place of a token where there is none to draw


def check_drawn(newest: Iterable[int]) -> None:
    """Raise TwigVLMError if one of the newest token ids stands for no token, because there was none to draw."""
    if _NOTHING in newest:
        raise TwigVLMError(
            "do_sample: there is no token to draw, since all scores are -inf, or one is nan or inf; load the base in bfloat16 or "
            "float32, or suppress fewer tokens"
        )


class Chooser:
    """The base's choice of tokens for the rows of a batch, and what the twig drafts by.

    Rows of one request are chosen for together. Greedy choices, and sampling with processors that look at scores alone, run on
    the device; a request with processors that look at ids is a slower lane, which reads what has been walked.

    Args:
        rows: rows of the batch.
        device: device of their logits.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        lanes: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            lanes.setdefault(id(row.request), []).append(index)
        self.rows = list(rows)
        self.lanes = [
            _Lane(rows[indices[0]].request, [rows[index] for index in indices], torch.tensor(indices, device=device))
            for indices in lanes.values()
        ]
        self.plain = all(lane.greedy for lane in self.lanes)
        self.sampled = [(index, row.noise) for index, row in enumerate(rows) if row.noise is not None]
        self.stops_early = any(lane.asks or lane.coupled for lane in self.lanes)

    def choose(self, logits: Float[Tensor, "rows nodes vocabulary"]) -> Choose:
        """The base's choices after the nodes of a verified draft, for a walk.

        Plain greedy choices are made all at once. Otherwise one is made when it is asked for: along the accepted path
        processors see the ids that plain generation would show them, so those with a memory work too.

        Raises:
            TwigVLMError: while the choices are made, processors leave a sampled row no token.
        """
        if self.plain:
            greedy = logits.argmax(dim=-1)
            return lambda step, node, walked, walking: greedy.gather(1, node[:, None])[:, 0]

        def choose(step: int, node: Tensor, walked: Tensor, walking: Tensor) -> Tensor:
            chosen = torch.zeros_like(node)
            for lane in self.lanes:
                at = lane.index
                scores = logits[at, node[at]]
                chosen[at] = scores.argmax(dim=-1) if lane.greedy else lane.choose(scores, walked[at], walking[at])
            return chosen

        return choose

    def go_on(self, walked: Int[Tensor, "rows walked"], walking: Bool[Tensor, " rows"]) -> Bool[Tensor, " rows"]:
        """Which rows of a walk continue. Rows in lockstep stop together.

        Objects of the caller are never asked what follows the end of an answer; plain generation does not ask that either.

        Args:
            walked: tokens chosen so far in this walk.
            walking: rows that could continue.
        """
        for lane in self.lanes:
            if not (lane.coupled or lane.asks):
                continue
            going = walking[lane.index]
            if lane.coupled:
                going = going.all().expand_as(going)
            if lane.asks:
                going = going & ~lane.ended(walked[lane.index].tolist(), going.tolist()).to(going.device)
            walking = walking.index_put((lane.index,), going)
        return walking

    def rescore(
        self,
        logits: Float[Tensor, "rows nodes draft_vocabulary"],
        depths: Int[Tensor, "rows nodes"],
        deepest: int,
        token_ids: Int[Tensor, " draft_vocabulary"] | None,
    ) -> Float[Tensor, "rows nodes draft_vocabulary"]:
        """Log-probabilities of the token after each node, of which the best are drafted: with the noise of a sampled row.

        Args:
            logits: the twig's.
            depths: of the nodes.
            deepest: upper bound of the depths.
            token_ids: of the draft vocabulary; None: the whole.
        """
        logits = logits.clone() if self.sampled else logits
        for index, noise in self.sampled:
            count = len(self.rows[index].tokens)
            drawn = torch.stack([noise.at(count + depth) for depth in range(deepest + 1)])
            drawn = drawn if token_ids is None else drawn[:, token_ids]
            drawn = drawn.clamp(min=torch.finfo(drawn.dtype).tiny).log()
            logits[index] = logits[index] / noise.temperature - drawn[depths[index]]
        return logits.log_softmax(dim=-1)


class _Lane:
    """Rows of one request, at these indices of the batch.

    `coupled`: they advance together. `asks`: processors look at ids, and so are asked along the accepted path only.
    """

    def __init__(self, request: Request, rows: Sequence[Row], index: Int[Tensor, " rows"]) -> None:
        self.request, self.rows, self.index = request, rows, index
        self.greedy = request.processors is None and rows[0].noise is None
        self.coupled = request.lockstep and len(rows) > 1
        self.asks = request.processors is not None and request.processors.needs_ids

    def choose(self, scores: Float[Tensor, "rows vocabulary"], walked: Tensor, walking: Tensor) -> Int[Tensor, " rows"]:
        """The base's choices after one node of each row."""
        scores = scores.float()
        processors = self.request.processors
        if processors is not None:
            scores = self._on_ids(scores, walked, walking, processors) if self.asks else processors.on_scores(scores)
        if self.rows[0].noise is not None:
            if self.asks and not bool(scores.amax(dim=-1).isfinite().all()):
                raise TwigVLMError(
                    "logits_processor: leaves no token to draw, since all scores are -inf, or one is nan or inf; let it keep one"
                )
            position = walked.shape[1]
            drawn = [row.noise.at(len(row.tokens) + position) for row in self.rows if row.noise is not None]
            scores = scores.softmax(dim=-1)
            # Where one probability is nan, all are.
            return (scores / torch.stack(drawn)).argmax(dim=-1).masked_fill(scores[:, 0].isnan(), _NOTHING)
        return scores.argmax(dim=-1)

    def ended(self, walked: Sequence[Sequence[int]], going: Sequence[bool]) -> Bool[Tensor, " rows"]:
        """Rows whose answers end with what has been walked; where they are coupled, all of them if one does."""
        ended = [goes and row.ends_with(new) for row, new, goes in zip(self.rows, walked, going, strict=True)]
        if self.request.lockstep and all(going):
            everyone = {row.index: new for row, new in zip(self.rows, walked, strict=True)}
            ends = self.request.ended(everyone)
            ended = [any(ended) or any(ends[row.index] for row in self.rows)] * len(ended)
        return torch.tensor(ended)

    def _on_ids(self, scores: Tensor, walked: Tensor, walking: Tensor, processors: Processors) -> Tensor:
        """The slow lane: reads what has been walked, and asks about rows that still walk alone."""
        new, going = walked.tolist(), walking.tolist()
        unfinished = [at for at, goes in enumerate(going) if goes]
        if unfinished and processors.needs_lockstep and self.request.lockstep:
            indices = [row.index for row in self.rows]
            everyone = scores.new_zeros(len(self.request.rows), scores.shape[1])
            everyone[indices] = scores
            ids = self.request.padded_ids(dict(zip(indices, new, strict=True)))
            return processors.on_batch(ids, everyone, [indices[at] for at in unfinished])[indices]
        for at in unfinished:
            row = self.rows[at]
            scores[at] = processors.on_row(row.index, row.ids(new[at]), scores[at : at + 1])[0]
        return scores
