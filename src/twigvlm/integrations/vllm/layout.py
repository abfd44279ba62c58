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
    if getattr(parallel, "pipeline_parallel_size", 1) > 1:
        raise ValueError(
            "twigvlm: a twig drafts on one pipeline stage; use --tensor-parallel-size instead of "
            "--pipeline-parallel-size"
        )
