"""A processor for the tiny models: one token per character, ChatML turns, visual tokens of 4x4 pixels."""

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from tests.tiny import IMAGE_TOKEN, VOCABULARY

START, END, IMAGE, PAD = "<|im_start|>", "<|im_end|>", "<image>", "<pad>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_processor(chat_template: str = CHAT_TEMPLATE, more: str = "", side: int = 4) -> LlavaProcessor:
    characters = "\n " + string.ascii_letters + string.digits + ".,:;!?'-" + more
    words = [PAD, START, END, "<unk>", *characters]
    words += [f"<unused{number}>" for number in range(VOCABULARY - 1 - len(words))]
    tokenizer = Tokenizer(models.WordLevel({**{word: i for i, word in enumerate(words)}, IMAGE: IMAGE_TOKEN}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"height": 4 * side, "width": 4 * side}, do_center_crop=False),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            pad_token=PAD,
            eos_token=END,
            extra_special_tokens=[START, IMAGE],
        ),
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=chat_template,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
