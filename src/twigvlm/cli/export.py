"""`twigvlm export`: write a twig for other programs."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from twigvlm.cli.options import Dtype
from twigvlm.errors import TwigVLMError

if TYPE_CHECKING:
    from twigvlm.model import TwigVLM


@dataclass(frozen=True)
class Export:
    """Write a twig for another program, and print how to use it there."""

    # One value today; named so that others can be added.
    to: Annotated[Literal["vllm"], Positional, arg(metavar="{vllm}")]
    """The program to export to."""
    out: Annotated[Path, Positional, arg(metavar="OUT")]
    """Directory for the drafter."""
    twig: str | None = None
    """Twig: a directory or a hub id. None: Sapling's own."""
    model: str = "sapling"
    """The twig's base model: `sapling` (embedded), a Hugging Face id, or a directory."""
    base: Path | None = None
    """Also write the base to this directory, with its weights under the names that vLLM's version of transformers knows. Sapling
    needs this, and so does a base that was saved by transformers 5.20 or later. None: only the drafter."""
    tokens: int = 4
    """Drafted tokens per step, in the printed commands."""
    scout_retain: float | None = None
    """Also prune in the printed commands, in scout mode: R̄, average number of visual tokens over all layers.
    None: no pruning."""
    scout_diverse: bool = False
    """In scout mode keep visual tokens with high scores that also differ from each other."""
    dtype: Dtype = "auto"
    """Data type of the written weights, and of the printed commands. auto: as stored in the base's files; vLLM then computes in
    half precision."""

    def run(self) -> None:
        """Export, and print the command line of vLLM and the same in Python."""
        print(self.write())

    def write(self) -> Commands:
        """Export, and return the commands with which vLLM serves the export."""
        from twigvlm.cli.output import busy, check_directory
        from twigvlm.cli.session import load_base
        from twigvlm.integrations.vllm.bases import check_new, is_readable, save_base
        from twigvlm.integrations.vllm.export import check_exportable, export
        from twigvlm.loading import SAPLING
        from twigvlm.model import TwigVLM
        from twigvlm.sapling import twig_path

        if self.tokens < 1:
            raise TwigVLMError(f"tokens={self.tokens}: must be 1 or more")
        if self.scout_retain is not None and not (isfinite(self.scout_retain) and self.scout_retain > 0):
            raise TwigVLMError(f"scout_retain={self.scout_retain:g}: must be a number of visual tokens, for example 64")
        if self.scout_diverse and self.scout_retain is None:
            raise TwigVLMError("scout_diverse: needs a budget; add --scout-retain 64")
        if self.base is not None and self.out.resolve().is_relative_to(self.base.resolve()):
            raise TwigVLMError(f"out {str(self.out)!r}: lies in --base, which must be new; name a directory beside it")
        check_directory(self.out)
        _check_replaceable(self.out)
        sapling = self.model == SAPLING
        if self.twig is None and not sapling:
            raise TwigVLMError(f"model {self.model!r}: has no twig of its own; name one with --twig")
        if sapling and self.base is None:
            raise TwigVLMError("model 'sapling': has no directory that vLLM could load; add --base DIRECTORY")
        if self.base is None and Path(self.model).is_dir() and not is_readable(Path(self.model)):
            raise TwigVLMError(
                f"model {self.model!r}: was saved by a newer transformers than vLLM has, under names that vLLM does not find; "
                "add --base DIRECTORY, which writes it under the names that vLLM knows, and serve that"
            )
        if self.base is not None:
            check_new(self.base)
        with busy(f"Loading {self.model}"):
            base, processor = load_base(self.model, self.dtype, "cpu")
            model = TwigVLM.from_pretrained(base, twig_path() if self.twig is None else self.twig)
        check_exportable(model.base)
        with busy(f"Exporting to {self.out}"):
            export(model, self.out)
            if self.base is not None:
                save_base(base, processor, self.base)
        # vLLM may be started elsewhere.
        out = str(self.out.absolute())
        served = Path(self.model) if self.base is None else self.base
        name = str(served.absolute()) if served.is_dir() else self.model
        overrides = None
        if self.scout_retain is not None:
            overrides = scout_overrides(model, processor, out, self.scout_retain, self.scout_diverse)
        return commands(name, out, base.config, self.tokens, overrides, self.dtype)


def _check_replaceable(out: Path) -> None:
    """Raise TwigVLMError if an export would replace the files of another model."""
    config = out / "config.json"
    if not config.is_file():
        return
    try:
        known = "twigvlm" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = False
    if not known:
        raise TwigVLMError(f"out {str(out)!r}: holds another model, whose files would be lost; name another directory")


def scout_overrides(
    model: TwigVLM, processor: Any, drafter: str, retain: float, diverse: bool = False
) -> dict[str, Any]:
    """Value of vLLM's option `hf_overrides` for scout mode.

    Args:
        model: the base with its twig.
        processor: the base's processor, whose chat template frames the question for which pictures are ranked.
        drafter: directory of the export.
        retain: R̄ of requests that name none.
        diverse: whether the kept tokens of those requests also differ from each other.

    Raises:
        TwigVLMError: the plug-in has no scout mode for this base.
    """
    from twigvlm.integrations.vllm import SCOUTS

    family = model.base.family.model_type
    clip = family != "llava" or model.model.config.vision_config.model_type == "clip_vision_model"
    if family not in SCOUTS or not clip:
        raise TwigVLMError(
            f"scout_retain={retain:g}: in vLLM, scout mode is for LLaVA-1.5-type bases (llava with a CLIP tower), Qwen2-VL "
            f"and Qwen2.5-VL, not for {family!r}{'' if clip else ' with another tower'}; leave it out"
        )
    content = [{"type": "image"}, {"type": "text", "text": "{question}"}]
    chat = [{"role": "user", "content": content}]
    settings = {
        "path": drafter,
        "retain": retain,
        "diverse": diverse,
        "question": "Describe the image in detail.",
        "prompt": processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False),
        "layers": model.base.num_layers,
        "trunk_layers": model.twig.config.trunk_layers,
    }
    # LLaVA's positions have one axis; vLLM hands out others than 0, 1, 2, … to models with three alone. And on targets that it
    # does not know by name, it looks for the placeholder under the name that LLaVA's config has.
    llava = family == "llava"
    needed = {"mrope_section": [0, 0, 0]} if llava else {"image_token_index": model.model.config.image_token_id}
    return {"architectures": [SCOUTS[family]], **needed, "twig_scout": settings}


@dataclass(frozen=True)
class Commands:
    """The commands with which vLLM serves a base with an exported twig."""

    drafter: str
    environment: dict[str, str]
    """Environment variables that vLLM needs."""
    serve: list[str]
    """Command line of `vllm serve`."""
    python: list[str]
    """The same settings as lines of Python."""

    def __str__(self) -> str:
        shell = [*(f"{name}={value}" for name, value in self.environment.items()), *map(shlex.quote, self.serve)]
        python = [f'import os\nos.environ["{name}"] = "{value}"' for name, value in self.environment.items()]
        lines = [f"Drafter: {self.drafter}", "", "Serve:", " ".join(shell), "", "In Python:", *python, *self.python]
        return "\n".join(lines)


def commands(
    base: str,
    drafter: str,
    config: Any,
    tokens: int,
    overrides: dict[str, Any] | None = None,
    dtype: str = "auto",
) -> Commands:
    """Make the commands with which vLLM serves a base with an exported twig.

    Args:
        base: directory or Hugging Face id of the base.
        drafter: directory of the export.
        config: configuration of the base.
        tokens: number of drafted tokens per step.
        overrides: overrides of the base's config, for scout mode; None: nothing is pruned.
        dtype: data type in which vLLM computes; "auto": vLLM's choice, which is never float32.
    """
    overrides = dict(overrides or {})
    speculative: dict[str, Any] = {"method": "eagle3", "model": drafter, "num_speculative_tokens": tokens}
    command = ["vllm", "serve", base, "--speculative-config", json.dumps(speculative)]
    arguments = [repr(base), f"speculative_config={speculative!r}"]
    if dtype != "auto":
        command += ["--dtype", dtype]
        arguments.append(f"dtype={dtype!r}")
    environment: dict[str, str] = {}
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if "mrope_section" in rope or overrides or config.model_type != "llava":
        # vLLM's second model runner gives drafters positions on one axis, without gaps, and takes few bases.
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if config.model_type == "qwen2_vl":
        # vLLM 0.32 looks for this name on every target but those of a list, and Qwen2-VL is not in it.
        overrides["image_token_index"] = config.image_token_id
    if overrides:
        command += ["--hf-overrides", json.dumps(overrides)]
        arguments.append(f"hf_overrides={overrides!r}")
    return Commands(drafter, environment, command, ["from vllm import LLM", f"llm = LLM({', '.join(arguments)})"])
