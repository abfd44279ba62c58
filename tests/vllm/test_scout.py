"""Scout mode in vLLM answers what it answers in twigvlm, whatever vLLM does with a prompt meanwhile."""

import json

import pytest
import torch
from PIL import Image

from tests.vllm.prompts import QUESTIONS, chat

RETAIN = 64
VISUAL = 576
"""Tokens of a picture of Sapling's."""
DESCRIBE = "Describe the image in detail."
ASKED = [(DESCRIBE, number, 48) for number in range(6)] + [(QUESTIONS[n % 4], n, 12) for n in range(6)]


def prompts(**options):
    return [
        {"text": chat(text, 1), "pictures": [number], "tokens": tokens, "processor": {"question": text, **options}}
        for text, number, tokens in ASKED
    ]


JOBS = [
    {"name": "alone", "prompts": prompts()},
    {"name": "together", "prompts": prompts(), "together": True},  # from the caches of embeddings and prefixes
    {"name": "fewer", "prompts": prompts(keep=20)[:3]},
    {"name": "diverse", "prompts": prompts(diverse=True)[:3]},
    {"name": "text", "prompts": [{"text": chat("Count from one to ten."), "tokens": 20}]},
]
# Two pictures that are kept whole, so that nothing is pruned and vLLM must answer as it does without scout mode.
BOTH = [{"text": chat("What is in the images?", 2), "pictures": [n, n + 1], "tokens": 20} for n in range(2)]
WHOLE = {"name": "whole", "prompts": [{**given, "processor": {"keep": VISUAL}} for given in BOTH]}


@pytest.fixture(scope="module")
def overrides(exported):
    from twigvlm.cli.export import scout_overrides
    from twigvlm.loading import load
    from twigvlm.sapling import twig_path

    _, processor, model = load(str(exported[1]), twig_path(), "float32", "cpu")
    return scout_overrides(model, processor, str(exported[0]), RETAIN)


@pytest.fixture(scope="module")
@torch.no_grad()
def expected(exported, pictures):
    """Answers of twigvlm's scout mode, and drafted tokens accepted per step."""
    from twigvlm.loading import load
    from twigvlm.sapling import twig_path

    _, processor, model = load(str(exported[1]), twig_path(), "float32", "cpu")
    chain = {"speculate": "chain", "draft_length": 4, "draft_threshold": 0.0, "return_dict_in_generate": True}
    answers, fewer, diverse, steps, accepted = [], [], [], 0, 0
    for number, given in enumerate(prompts()):
        picture = Image.open(pictures[given["pictures"][0]]).convert("RGB")
        inputs = processor(text=given["text"], images=picture, return_tensors="pt")
        how = {"max_new_tokens": given["tokens"], "do_sample": False, "scout": True, **chain}
        output = model.generate(**inputs, retain=RETAIN, **how)
        length = inputs["input_ids"].shape[1]
        answers.append(output.sequences[0, length:].tolist())
        steps += len(output.accepted_lengths[0]) - 1
        accepted += sum(output.accepted_lengths[0][1:])
        if number < 3:
            fewer.append(model.generate(**inputs, keep=20, **how).sequences[0, length:].tolist())
            diverse.append(model.generate(**inputs, retain=RETAIN, diverse=True, **how).sequences[0, length:].tolist())
    return answers, fewer, diverse, accepted / steps


@pytest.fixture(scope="module")
def plain(engine):
    """What vLLM answers without scout mode and without a twig."""
    return engine([JOBS[-1], {"name": "whole", "prompts": BOTH}], tokens=0)


RUNS = {
    "plain": {"tokens": 0},
    # All tokens after a picture stand at positions beyond the longest sequence.
    "drafted": {"max_model_len": 256},
    "chunked": {"max_num_batched_tokens": 32, "enable_chunked_prefill": True},
}


@pytest.mark.parametrize("run", RUNS)
def test_answers_are_those_of_twigvlm(engine, overrides, expected, plain, run):
    # The other runs have no room for two whole pictures.
    jobs = [*JOBS, WHOLE] if run == "plain" else JOBS
    results = engine(jobs, hf_overrides=json.loads(json.dumps(overrides)), **RUNS[run])
    answers, fewer, diverse, own = expected
    assert max(results["alone"]["prompt_tokens"]) < 70  # of 592
    assert results["alone"]["ids"] == answers
    assert results["together"]["ids"] == answers
    assert results["fewer"]["ids"] == fewer
    assert results["diverse"]["ids"] == diverse
    assert results["fewer"]["prompt_tokens"][0] == results["alone"]["prompt_tokens"][0] - 25
    for job in ("text", "whole"):
        if job in results:
            assert results[job]["ids"] == plain[job]["ids"]
            assert results[job]["prompt_tokens"] == plain[job]["prompt_tokens"]
    if run in ("drafted", "chunked"):
        made = results["alone"]["drafts"]
        reached = made["accepted_tokens"] / made["drafts"]
        print(f"\naccepted per step: vLLM {reached:.3f}, twigvlm {own:.3f}")
        assert reached >= 0.97 * own
