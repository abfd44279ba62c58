"""Services on tiny models, and servers around them that listen on a port of this machine."""

import base64
import contextlib
import threading
import time
from io import BytesIO

import torch
from PIL import Image
from transformers import LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tests.families import tiny
from tests.tiny import tiny_llava
from tests.tiny_processor import CHAT_TEMPLATE, tiny_processor
from twigvlm import TwigConfig, TwigVLM
from twigvlm.serving.app import create_app
from twigvlm.serving.hosts import allowed_hosts
from twigvlm.serving.server import make_server
from twigvlm.serving.service import Service

NAME = "tiny"


def tiny_model(context=128):
    """A twig with a P-Head, whose drafts are often accepted."""
    torch.manual_seed(0)
    model = TwigVLM.grow(
        tiny_llava(deep_scale=0.03, from_layer=2, context=context), TwigConfig(2, 2, pruning_head=True)
    )
    model.generation_config.eos_token_id = 2  # as the processor's
    return model


def tiny_service(model=None, **options):
    """A service; options as of `Service`."""
    service = Service(model or tiny_model(), tiny_processor(more='{}[]"'), NAME, **options)
    service.grammars.tokenizer = _grammar_tokenizer(service.tokenizer)
    return service


def tiled_service():
    """A service on a tiny LLaVA-NeXT, whose pictures become tiles."""
    base = tiny("llava_next")
    vision = base.config.vision_config
    side, known = vision.image_size, tiny_processor()
    tiles = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=base.config.image_grid_pinpoints,
    )
    processor = LlavaNextProcessor(
        tiles,
        known.tokenizer,
        vision.patch_size,
        "default",
        CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )
    base.config.image_seq_length = (side // vision.patch_size) ** 2
    model = TwigVLM.grow(base, TwigConfig(2, 2, pruning_head=True))
    model.generation_config.eos_token_id = 2
    return Service(model, processor, NAME)


class _Characters:
    """The tiny tokenizer as llguidance asks for it: it knows no decoder that only joins characters."""

    eos_token_id, bos_token_id, special_token_ids = 2, None, (0, 1, 2, 3, 99)

    def __init__(self, tokenizer):
        words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.tokens = [b"\xff" + word.encode() if len(word) > 1 else word.encode() for word in words]

    def __call__(self, text):
        return [self.tokens.index(bytes([byte])) for byte in (text if isinstance(text, bytes) else text.encode())]


def _grammar_tokenizer(tokenizer):
    import llguidance

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Characters(tokenizer)))


@contextlib.contextmanager
def served(service, **options):
    """Serve until the block ends; yields the server's address. Options as of `create_app`."""
    app = create_app(service, **{"hosts": allowed_hosts("127.0.0.1", ()), **options})
    server = make_server(app, service, "127.0.0.1", 0, 5)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        yield server.address
    finally:
        if options.get("stop_with_app", True):  # others may use a service that lives on
            service.worker.drain()
        server.should_exit = True
        thread.join()


def wait_until(condition, seconds=10):
    """Wait until something is so; returns what it says."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return found


def slow_down(service, seconds, look=lambda: None):
    """Make each step of the service's engines last longer, and look at something before it."""
    make = service.model.engine

    def engine(**options):
        made = make(**options)
        step = made.step
        made.step = lambda: (look(), time.sleep(seconds), step())[2]
        return made

    service.model.engine = engine


def picture(colour="red", size=(20, 12), form="PNG"):
    """A picture as a data URI."""
    data = BytesIO()
    image = Image.radial_gradient("L").resize(size).convert("RGB")
    image.paste(colour, (0, 0, size[0] // 2, size[1] // 2))
    image.save(data, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def chat(question="what is it?", images=(), **options):
    """The body of a request; `None` leaves a default out."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    body = {"model": NAME, "messages": messages, "max_completion_tokens": 12, **options}
    return {name: value for name, value in body.items() if value is not None}


def expected(service, question, images=(), **options):
    """The ids of a single run of `generate` for the same question."""
    inputs = inputs_of(service, question, images)
    output = service.model.generate(**inputs, eos_token_id=service.eos, **options)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def inputs_of(service, question, images=()):
    """The processor's outputs for the same question."""
    from twigvlm.inputs import build_inputs, user_turn

    return build_inputs(service.processor, [[user_turn(question, list(images))]], service.model.device, torch.float32)


def decoded(service, ids):
    """As the server writes them."""
    return service.tokenizer.decode([token for token in ids if token not in service.eos], skip_special_tokens=True)
