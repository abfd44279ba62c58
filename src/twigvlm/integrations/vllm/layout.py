"""What an export says about itself, and which target it fits on."""

from typing import Any

FORMAT = 1
"""Of the entry `twigvlm` in an export's config; another number is another layout."""
DIMENSIONS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)
"""Of the base's language model: they must be the target's."""


def check_target(record: dict[str, Any], target: Any, parallel: Any) -> None:
    """Refuse an export that does not belong to the model that is served.

    Args:
        record: the entry `twigvlm` of its config.
        target: Hugging Face config of the served language model.
        parallel: vLLM's parallel configuration.

    Raises:
        ValueError: it is another layout, of another base, or the engine has pipeline stages.
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


def check_stages(parallel: Any, what: str) -> None:
    """Refuse an engine with pipeline stages.

    Args:
        parallel: vLLM's parallel configuration.
        what: goes on in one stage alone, as the beginning of a sentence.
    """
    if getattr(parallel, "pipeline_parallel_size", 1) > 1:
        raise ValueError(
            f"twigvlm: {what} on one pipeline stage; use --tensor-parallel-size instead of --pipeline-parallel-size"
        )


def check_attention(backend: str) -> None:
    """Refuse an attention backend of the drafter that does not tell where sequences stand in the cache.

    Args:
        backend: vLLM's name of it.
    """
    if backend.startswith("FLASHINFER"):
        raise ValueError(
            f"twigvlm: on this base a twig cannot draft with the attention backend {backend}; add "
            '"attention_backend": "FLASH_ATTN" to --speculative-config'
        )
