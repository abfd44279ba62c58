"""What this library's loop cannot do of what Hugging Face's `generate` takes, refused before any work."""

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from twigvlm.errors import TwigVLMError
from twigvlm.kv.prefix_cache import PrefixCache

_OF_TOKENS = ("position_ids", "token_type_ids", "mm_token_type_ids")
_WHOLE_NUMBERS = (
    "max_new_tokens", "max_length", "min_new_tokens", "min_length", "num_return_sequences", "top_k",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
)  # fmt: skip
_NUMBERS = (
    "max_time", "temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "encoder_repetition_penalty", "guidance_scale",
)  # fmt: skip
_OTHER_WAYS = (
    "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "penalty_alpha", "dola_layers", "constraints",
    "force_words_ids",
)  # fmt: skip
"""Options that ask for another way of generating than greedy decoding and sampling."""


def is_of_prompt(name: str) -> bool:
    """Whether an argument of `generate` is a part of the prompt, besides its ids and its mask."""
    return name.startswith(("pixel_values", "image_", "video_")) or name in _OF_TOKENS


def check_arguments(kwargs: dict[str, Any], defaults: GenerationConfig) -> None:
    """Refuse, before any work, what this loop would otherwise have to drop, and arguments of another kind than it takes.

    Args:
        kwargs: arguments of `generate`.
        defaults: the checkpoint's generation config.

    Raises:
        TwigVLMError: an argument is missing, of another kind, out of range or not supported.
    """
    if kwargs.get("input_ids") is None:
        raise TwigVLMError("input_ids is missing: pass the processor's outputs")
    _check_ids(kwargs["input_ids"])
    _check_types(kwargs)
    if (mask := kwargs.get("attention_mask")) is not None:
        check_mask(mask)
    given = kwargs.get("generation_config")
    of_call = (kwargs, {} if given is None else vars(given))
    for wanted, kind, names in (("whole number", Integral, _WHOLE_NUMBERS), ("number", Real, _NUMBERS)):
        for name in names:
            value = _first(name, *of_call)
            if value is not None and not isinstance(value, kind):
                raise TwigVLMError(f"{name}={value!r}: must be a {wanted}")
    max_new_tokens, num_beams = (_first(name, *of_call, vars(defaults)) for name in ("max_new_tokens", "num_beams"))
    if max_new_tokens is not None and max_new_tokens < 1:
        raise TwigVLMError(f"max_new_tokens={max_new_tokens}: must be 1 or more")
    if num_beams not in (None, 1):
        raise TwigVLMError(
            f"num_beams={num_beams!r}: beam search is not supported with a twig; pass num_beams=1, or also do_sample=True and "
            "num_return_sequences for several answers"
        )
    for name in ("assistant_model", "custom_generate", "past_key_values", "cache", "inputs_embeds"):
        if kwargs.get(name) is not None:
            raise TwigVLMError(f"{name} is not supported with a twig: leave it out, or use model.disabled()")
    # Some of these Hugging Face's generate would act on, or refuse for another reason, before the loop is asked.
    # What a config repeats of the checkpoint's is nobody's wish.
    for config, known in zip(of_call, ({}, vars(defaults)), strict=True):
        for name in ("synced_gpus", "token_healing", "cache_implementation", "prefill_chunk_size"):
            if config.get(name) and config[name] != known.get(name):
                raise TwigVLMError(
                    f"{name}={config[name]!r} is not supported with a twig: leave it out, or use model.disabled()"
                )


def _first(name: str, *configs: dict[str, Any]) -> Any:
    """What the first of these that says something says."""
    return next((config[name] for config in configs if config.get(name) is not None), None)


def _check_ids(ids: Any) -> None:
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise TwigVLMError(f"input_ids: is {shape}; pass the processor's ids, a tensor [prompts, tokens]")
    if ids.dtype not in (torch.long, torch.int):
        raise TwigVLMError(f"input_ids: holds {ids.dtype}; pass the processor's ids, which are torch.long")


def _check_types(kwargs: dict[str, Any]) -> None:
    given = kwargs.get("generation_config")
    if given is not None and not isinstance(given, GenerationConfig):
        raise TwigVLMError(f"generation_config: is {type(given).__name__}; pass transformers.GenerationConfig(...)")
    for name in ("logits_processor", "stopping_criteria"):
        if kwargs.get(name) is not None and not isinstance(kwargs[name], list | tuple):
            raise TwigVLMError(f"{name}: is {type(kwargs[name]).__name__}; pass a list of them")
    streamer, allowed = kwargs.get("streamer"), kwargs.get("prefix_allowed_tokens_fn")
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise TwigVLMError(f"streamer: is {type(streamer).__name__}; pass one of transformers, such as TextStreamer")
    if allowed is not None and not callable(allowed):
        raise TwigVLMError(
            f"prefix_allowed_tokens_fn: is {type(allowed).__name__}; pass a function of a row's number and its ids"
        )
    mask, shape = kwargs.get("attention_mask"), tuple(kwargs["input_ids"].shape)
    if mask is not None and (not isinstance(mask, Tensor) or tuple(mask.shape) != shape):
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise TwigVLMError(f"attention_mask: is {found}; pass the processor's, of input_ids' shape {shape}")
    for name, value in kwargs.items():
        if is_of_prompt(name) and value is not None and not isinstance(value, Tensor):
            raise TwigVLMError(f"{name}: is {type(value).__name__}; call the processor with return_tensors='pt'")
    positions = kwargs.get("position_ids")
    if positions is not None and positions.shape[-1:] != shape[1:]:
        raise TwigVLMError(
            f"position_ids: is {tuple(positions.shape)}; give one for each of the {shape[1]} tokens, or leave them out"
        )


def check_mask(mask: Tensor) -> None:
    """Refuse a mask that is not one of ones and zeros, padding on the right, and prompts of padding alone.

    Args:
        mask: [batch, tokens], 0 at padding.
    """
    if bool((mask < 0).any()):
        raise TwigVLMError("attention_mask: holds negative numbers; give 1 for tokens and 0 for padding")
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise TwigVLMError(
            "attention_mask: hides tokens after others; pad on the left, with processor.tokenizer.padding_side = 'left'"
        )
    if not bool(mask[:, -1].all()):
        raise TwigVLMError("attention_mask: hides a whole prompt; leave that prompt out")


def check_watched_layer(kwargs: dict[str, Any], config: Any) -> None:
    """Refuse another layer of the vision tower than the one that is watched for a pruner that ranks by it."""
    asked, watched = kwargs.get("vision_feature_layer"), getattr(config, "vision_feature_layer", None)
    if asked is not None and asked != watched:
        raise TwigVLMError(
            f"vision_feature_layer={asked!r}: this pruner looks at layer {watched!r} of the vision tower, as the base's config "
            "says; change that, or leave it out"
        )


def check_generation(config: GenerationConfig) -> None:
    """Refuse ways to generate, and outputs, that the loop does not know."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        asked = {name: getattr(config, name, None) for name in _OTHER_WAYS}
        options = ", ".join(
            f"{name}={value!r}" for name, value in asked.items() if not (value is None or value is False)
        )
        raise TwigVLMError(
            f"{options}: asks for {mode.value}, but only greedy decoding and sampling are supported; leave it out"
        )
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise TwigVLMError(f"{name}=True is not supported with a twig: leave it out, or use model.disabled()")
    if config.use_cache is False:
        raise TwigVLMError("use_cache=False: a twig needs the cache; leave it out")


def check_memory(memory: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what is no prefix cache, and positions beside one, which may hold the same tokens at others."""
    if memory is None:
        return
    if not isinstance(memory, PrefixCache):
        raise TwigVLMError(f"memory: is {type(memory).__name__}; pass a PrefixCache, or ask through chat")
    if kwargs.get("position_ids") is not None:
        raise TwigVLMError("position_ids: cannot be given beside memory; leave one of them out")


def check_rows(rows: int, streamer: Any, prefix: PrefixCache | None) -> None:
    """Refuse several answers where one is expected."""
    if rows > 1 and streamer is not None:
        raise TwigVLMError(f"streamer: takes one answer, not {rows}; leave it out, or ask for one answer")
    if rows > 1 and prefix is not None:
        raise TwigVLMError(f"{rows} answers: a conversation continues with one; ask for one answer")
