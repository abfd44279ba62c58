"""`twigvlm generate`: answer a prompt about images, a video or text alone, or a file of prompts."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from twigvlm.cli.options import AnswerOptions
from twigvlm.cli.parsing import UsageError
from twigvlm.config import PruningConfig, SamplingConfig, Speculate

if TYPE_CHECKING:
    from twigvlm.cli.answer import Answer
    from twigvlm.cli.prompts import Prompt
    from twigvlm.cli.session import Session


@dataclass(frozen=True)
class Generate(AnswerOptions):
    """Answer a prompt about images, a video or text alone, or a file of prompts."""

    prompt: str | None = None
    """Question or instruction. Give either this or --prompts."""
    prompts: Path | None = None
    """File of prompts, answered one after another: one prompt per line, or a .jsonl file of objects with `prompt` and, where
    they differ from the options, `image` and `video` (a path or a list of paths, relative to the file)."""
    image: tuple[str, ...] = ()
    """Image files or data URIs, which precede the text in this order. None given: text alone."""
    video: str | None = None
    """Video file, for bases that accept videos (`twigvlm families`). None: no video."""
    frames: int | None = None
    """Number of evenly spaced frames to take from the video. None: as the base's processor does."""
    speculate: Annotated[
        Speculate | None, tyro.conf.arg(help_behavior_hint="(default: chain where there is a twig, otherwise none)")
    ] = None
    json: bool = False
    """Print each answer as a JSON object on its own line instead of plain text."""
    pruning: PruningConfig = field(default_factory=PruningConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            raise UsageError("required: --prompt STR or --prompts PATH; give one of them")

    @property
    def continuation(self) -> str:
        """How to continue after Ctrl-C, for the message."""
        if self.prompts is None:
            return "run the command again to start over"
        return f"to continue, run the command again with the unanswered lines of {str(self.prompts)!r} in a file of their own"

    def run(self) -> int:
        """Answer, and print the answers or JSON objects on stdout; the exit code is 2 if a prompt of a file failed."""
        from twigvlm.cli.answer import check_request
        from twigvlm.cli.output import steps
        from twigvlm.cli.prompts import Prompt, read_prompts
        from twigvlm.cli.session import SessionConfig, open_session
        from twigvlm.errors import TwigVLMError

        config = SessionConfig.resolve(self.model, self.twig, self.pruning, self.speculate)
        videos = () if self.video is None else (self.video,)
        if self.prompts is None:
            assert self.prompt is not None, "the parser requires one of them"
            prompts = [Prompt(self.prompt, self.image, videos)]
        else:
            prompts = read_prompts(self.prompts, self.image, videos)
        for prompt in prompts:
            check_request(prompt.text, self.max_new_tokens)
        if self.frames is not None and self.frames < 1:
            raise TwigVLMError(f"frames={self.frames}: must be 1 or more")
        if self.frames is not None and not any(prompt.videos for prompt in prompts):
            raise TwigVLMError(f"frames={self.frames}: needs a video; add --video, or leave --frames out")
        if self.prompts is None:
            prompts[0].question()  # for its errors, before a model is loaded
        session = open_session(config, self.dtype, self.device)
        if self.prompts is not None:
            return self._answer_file(session, prompts)
        if not self.json:
            self._print(session, self._answer(session, prompts[0], stream=True))
            return 0
        with steps("Answering", self.max_new_tokens, last_line=False) as advance:
            answer = self._answer(session, prompts[0], on_token=lambda: advance())
        self._print(session, answer)
        return 0

    def _answer_file(self, session: Session, prompts: list[Prompt]) -> int:
        from twigvlm.cli.output import steps
        from twigvlm.errors import TwigVLMError, one_line

        failed = 0
        # On a terminal the answers themselves show how far it is, and a bar would cut through them.
        quiet = contextlib.nullcontext(lambda: None)
        with quiet if sys.stdout.isatty() else steps("Answering", len(prompts), last_line=False) as advance:
            for number, prompt in enumerate(prompts, start=1):
                try:
                    answer = self._answer(session, prompt, stream=not self.json)
                except TwigVLMError as error:
                    failed += 1
                    print(f"twigvlm: error: prompt {number} of {len(prompts)}: {one_line(error)}", file=sys.stderr)
                    if self.json:
                        print(json.dumps({"prompt": prompt.text, "failed": one_line(error)}), flush=True)
                else:
                    self._print(session, answer, prompt.text, f"{number} of {len(prompts)}: ")
                advance()
        return 2 if failed else 0

    def _answer(self, session: Session, prompt: Prompt, **how: Any) -> Answer:
        from twigvlm.cli.answer import answer_question
        from twigvlm.errors import TwigVLMError

        if prompt.videos and getattr(session.processor, "video_processor", None) is None:
            raise TwigVLMError(
                f"video {prompt.videos[0]!r}: model {self.model!r} takes no videos; choose one that does ('twigvlm families')"
            )
        frames = prompt.videos and self.frames is not None
        return answer_question(
            session,
            prompt.question(),
            self.max_new_tokens,
            accelerated=session.config.accelerated,
            sampling=self.sampling,
            processor_options={"num_frames": self.frames, "do_sample_frames": True} if frames else {},
            **how,
        )

    def _print(self, session: Session, answer: Answer, prompt: str | None = None, start: str = "") -> None:
        """Print the answer as a JSON object on stdout, or the figures of a streamed answer on stderr."""
        if self.json:
            asked = {} if prompt is None else {"prompt": prompt}
            settings = {**session.settings(), **session.config.generate_options, **asdict(self.sampling)}
            print(json.dumps({**asked, **answer.as_json(), **settings}), flush=True)
            return
        print(
            f"[{start}{answer.num_tokens} tokens, {answer.tokens_per_second:.1f} tokens/s, prefill {answer.prefill_ms:.0f} ms, "
            f"{answer.kept_tokens} of {answer.visual_tokens} visual tokens kept]",
            file=sys.stderr,
        )
