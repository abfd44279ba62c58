"""Rendered chat templates."""

from typing import Any


def special_tokens(text: str, tokenizer: Any) -> dict[str, bool]:
    """Option to tokenize a rendered template with, as transformers' own `apply_chat_template(tokenize=True)` does.

    A template may begin with the first token itself: then the tokenizer shall not add it once more.
    """
    return {"add_special_tokens": tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)}
