"""What the tests ask: 30 prompts, short and long, of one picture, of two and of text alone."""

from twigvlm.sapling.assemble import IMAGE_TOKEN

QUESTIONS = (
    "What is in the top left?",
    "What is in the middle?",
    "What is at the bottom right?",
    "How many things are there?",
)
TEXTS = (
    "What is the capital of France?",
    "Count from one to ten.",
    "Write a sentence about the sea.",
    "Name three colours.",
)


def chat(text, pictures=0):
    """A prompt as Sapling's chat template makes it."""
    images = f"{IMAGE_TOKEN}\n" * pictures
    return f"<|im_start|>user\n{images}{text}<|im_end|>\n<|im_start|>assistant\n"


def descriptions(count, tokens=64):
    """Descriptions of that many pictures."""
    text = chat("Describe the image in detail.", 1)
    return [{"text": text, "pictures": [number], "tokens": tokens} for number in range(count)]


def thirty():
    """9 descriptions, 15 short answers, 4 of text alone and 2 of two pictures."""
    asked = [{"text": chat(QUESTIONS[n % 4], 1), "pictures": [n % 9], "tokens": 12} for n in range(15)]
    alone = [{"text": chat(text), "tokens": 40} for text in TEXTS]
    both = [{"text": chat("What is in the images?", 2), "pictures": [n, n + 1], "tokens": 40} for n in range(2)]
    return [*descriptions(9), *asked, *alone, *both]
