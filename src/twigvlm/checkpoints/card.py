"""The model card of a twig, written from its config and the record of its training."""

from typing import Any

from twigvlm.twig.block import Twig

MARK = "<!-- Written by twigvlm. Without this line the file is yours: it is not written again. -->"

_CARD = """---
library_name: twigvlm
pipeline_tag: image-text-to-text
{base_model}tags:
- twigvlm
- speculative-decoding
- visual-token-pruning
---
{mark}

# {name}

A twig on {base}: {layers} decoder layers{head} on the output of its layer {trunk}, with {millions:.1f} M parameters;
the base's weights are not in here. It chooses the visual tokens that matter to a question, and drafts the answer for the
base to check. In float32 drafting does not change the answer; pruning may. The twig fits on this base only, loaded in any
number format. With `retain`, the average number of visual tokens per layer, `generate` also prunes.

```python
from transformers import AutoModelForImageTextToText
from twigvlm import TwigVLM

base = AutoModelForImageTextToText.from_pretrained("{base_id}", dtype="auto")
model = TwigVLM.from_pretrained(base, "{name}")
output = model.generate(**inputs, max_new_tokens=256, speculate="chain")
```

## Shape

{shape}

## Training

{training}
"""


def model_card(twig: Twig, name: str, base: str | None) -> str:
    """The text of README.md.

    Args:
        twig: the twig.
        name: name of the twig, on the hub or on disk.
        base: hub id of its base; None: it has none.
    """
    config = twig.config
    return _CARD.format(
        mark=MARK,
        name=name,
        base_model="" if base is None else f"base_model: {base}\nbase_model_relation: adapter\n",
        base="a vision-language model" if base is None else f"[{base}](https://huggingface.co/{base})",
        base_id=base or "THE-BASE",
        layers=config.twig_layers,
        head=" and a P-Head" if config.pruning_head else "",
        trunk=config.trunk_layers,
        millions=sum(parameter.numel() for parameter in twig.parameters()) / 1e6,
        shape=_table(vars(config)),
        training="\n\n".join(map(_stage, twig.record)) or "No record of a training came with this twig.",
    )


def _stage(entry: dict[str, Any]) -> str:
    batch = entry.get("batch")  # older records have none
    steps = f"{entry['steps']} steps" + ("" if batch is None else f" of {batch} samples each")
    head = f"### {entry['stage']}\n\n{steps}, on {entry['samples']} samples; at the end:"
    return f"{head}\n\n{_table(entry['final'])}\n\nSettings:\n\n{_table(entry['settings'])}"


def _table(values: dict[str, Any]) -> str:
    rows = (f"| {name} | {f'{value:.6g}' if isinstance(value, float) else value} |" for name, value in values.items())
    return "\n".join(("| | |", "|---|---|", *rows))
