"""Samples in LLaVA's format, made from their turns alone, and pictures for them."""

from PIL import Image


def ask(*turns, **rest):
    """A sample in LLaVA's format."""
    speakers = ("human", "gpt") * (len(turns) // 2)
    return {"conversations": [{"from": s, "value": v} for s, v in zip(speakers, turns, strict=True)], **rest}


RED, BLUE = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 20), "blue")
