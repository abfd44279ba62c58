"""`twigvlm generate`: answer one question about one picture."""

import json
import sys
from dataclasses import dataclass
from typing import Literal

from twigvlm.config import Speculate


@dataclass(frozen=True)
class Generate:
    """Answer one question about one picture, with or without a twig."""

    image: str
    """Image file, or a data URI."""
    prompt: str
    """Question or instruction about the image."""
    model: str = "sapling"
    """The base: `sapling` (embedded), a Hugging Face id or a directory."""
    twig: str | None = None
    """Twig that was grown on the base: a directory or a hub id. On Sapling its own twig is the default."""
    retain: float | None = None
    """Average number of visual tokens over all layers to prune down to, for example 64. None: no pruning."""
    speculate: Speculate | None = None
    """Draft answer tokens with the twig; the answer stays the same. None: chain where there is a
    twig. auto measures this machine first, which takes a few seconds."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights. auto: as the base's files say; Sapling's is bfloat16, on a CPU without it float32."""
    device: str = "auto"
    """Where to run: auto (a GPU if there is one), cpu, cuda, cuda:1, mps, …"""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float | None = None
    """Draw the answer's tokens at this temperature. None: always the most probable one."""
    top_p: float | None = None
    """Draw from the most probable tokens only, which together have this probability. None: from all."""
    seed: int | None = None
    """Of the draws. Speculation changes none of them, and the base alone draws the same. None: 0."""
    json: bool = False
    """Print one JSON object instead of the bare answer."""

    def run(self) -> None:
        """Answer, and print the answer or the JSON object on stdout."""
        from twigvlm.cli.answer import ask, check_request, sampling_options
        from twigvlm.cli.output import busy
        from twigvlm.cli.session import Plan, open_session
        from twigvlm.images import load_image

        plan = Plan.resolve(self.model, self.twig, self.retain, self.speculate)
        check_request(self.prompt, self.max_new_tokens)
        sampling = sampling_options(self.temperature, self.top_p, self.seed)
        image = load_image(self.image)
        with busy(f"Loading {self.model}"):
            session = open_session(plan, self.dtype, self.device)
        answer = ask(
            session,
            image,
            self.prompt,
            self.max_new_tokens,
            accelerated=plan.accelerated,
            stream=not self.json,
            sampling=sampling,
            seed=self.seed or 0,
        )
        if self.json:
            print(
                json.dumps({**answer.report(), **session.report(), "retain": plan.retain, "speculate": plan.speculate})
            )
        else:
            print(
                f"[{answer.num_tokens} tokens, {answer.tokens_per_second:.1f} tokens/s, prefill {answer.prefill_ms:.0f} ms, "
                f"{answer.kept_tokens} of {answer.visual_tokens} visual tokens kept]",
                file=sys.stderr,
            )
