"""The description that an export carries, and checks that it fits the served model and vLLM's options."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
"""Version of the entry `twigvlm` in an export's config."""
DIMENSIONS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)
"""Dimensions of the base's language model, which must equal those of the target."""


def check_target(record: dict[str, Any], target: Any, parallel: Any) -> None:
    """Refuse an export that does not belong to the model that is served.

    Args:
        record: the entry `twigvlm` of the export's config.
        target: Hugging Face config of the served language model.
        parallel: vLLM's parallel configuration.

    Raises:
        ValueError: the export has another format or belongs to another base, or the engine has pipeline stages.
    """
    if record.get("format") != FORMAT:
        raise ValueError(
            f"twigvlm: this export has format {record.get('format')}, this twigvlm reads {FORMAT}; export the twig again"
        )
    for name, value in record["base"].items():
        given = getattr(target, name, None)
        if given != value:
            raise ValueError(
                f"twigvlm: this twig grew on a base with {name} {value}, and the model that is served has {given}; "
                "serve the base that the twig was trained on"
            )
    check_stages(parallel, "a twig drafts")


def check_runner(second: bool) -> None:
    """Raise ValueError for vLLM's second model runner, which supports neither drafts on a base with M-RoPE nor scout mode.

    Args:
        second: whether vLLM runs its second model runner.
    """
    if second:
        raise ValueError(
            "twigvlm: vLLM's second model runner gives drafts no positions of a base with M-RoPE or in scout mode; set the "
            "environment variable VLLM_USE_V2_MODEL_RUNNER=0"
        )


def check_scout(config: Any) -> None:
    """Raise ValueError for options of vLLM that scout mode does not support.

    Args:
        config: vLLM's configuration.
    """
    check_stages(config.parallel_config, "the places of kept tokens are known")
    if config.compilation_config.cudagraph_mm_encoder:
        raise ValueError(
            "twigvlm: cudagraph_mm_encoder=true captures the vision tower without the ranking of scout mode; leave it out of "
            "--compilation-config"
        )
    rate = config.model_config.get_multimodal_config().video_pruning_rate
    if rate:
        raise ValueError(f"twigvlm: --video-pruning-rate {rate:g} does not work in scout mode; leave it out")


def check_scouting(settings: Mapping[str, Any], target: Any, parallel: Any) -> None:
    """Refuse an export that scout mode cannot rank by. Without drafts, nothing else compares it with the served model.

    Args:
        settings: entry `twig_scout` of the model's config, as set by `--hf-overrides`.
        target: Hugging Face config of the served language model.
        parallel: vLLM's parallel configuration.

    Raises:
        ValueError: the export is missing, does not belong to the model, or has changed since the settings were printed.
    """
    config = Path(settings["path"]) / "config.json"
    if not config.is_file():
        raise ValueError(
            f"twigvlm: {str(config)!r}, which twig_scout in --hf-overrides leads to, is not there; export the twig again, and "
            "use what is printed then"
        )
    record = json.loads(config.read_text(encoding="utf-8")).get("twigvlm", {})
    check_target(record, target, parallel)
    if record["trunk_layers"] != settings["trunk_layers"]:
        raise ValueError(
            "twigvlm: the export has changed since its --hf-overrides were printed (trunk_layers "
            f"{settings['trunk_layers']} there, {record['trunk_layers']} now); use what the last export printed"
        )


def check_stages(parallel: Any, what: str) -> None:
    """Raise ValueError for an engine with pipeline stages.

    Args:
        parallel: vLLM's parallel configuration.
        what: what needs a single stage, as the beginning of the message.
    """
    if getattr(parallel, "pipeline_parallel_size", 1) > 1:
        raise ValueError(
            f"twigvlm: {what} on one pipeline stage; use --tensor-parallel-size instead of --pipeline-parallel-size"
        )


def check_attention(backend: str) -> None:
    """Raise ValueError for a drafter's attention backend that does not report where sequences start and how long they are.

    Args:
        backend: vLLM's name of the backend.
    """
    if backend.startswith("FLASHINFER"):
        raise ValueError(
            f"twigvlm: on this base a twig cannot draft with the attention backend {backend}; add "
            '"attention_backend": "FLASH_ATTN" to --speculative-config'
        )
