"""Tiny Qwen-VLs: positions on three axes, and features that enter between layers."""

import dataclasses

import pytest
import torch
from PIL import Image

from tests.vllm.tiny_qwen import END, IMAGE, START, TRUNK, WORDS, write
from twigvlm.base.token_inputs import slice_tokens

TOKENS, DRAFTED = 32, 4
TEXTS = [f"w1 w2 w{n} {START} {IMAGE} {END} w3 w{n + 5} w7" for n in range(8, 16)]


@torch.no_grad()
def accepted_in_slots(model, inputs, answer):
    """Steps and accepted drafts of chains that never see the prompt's first token, as in the slots of EAGLE."""
    base, twig, prompt = model.base, model.twig, model.base.prompt(**inputs)
    last, steps, accepted = int(prompt.position_ids.max()), 0, 0

    def next_token(new):
        count = len(new)
        positions = torch.arange(last + 1, last + 1 + count).expand(*prompt.position_ids.shape[:-1], -1)
        whole = dataclasses.replace(
            prompt,
            hidden=torch.cat((prompt.hidden, base.embed(torch.tensor([new]))), dim=1),
            position_ids=torch.cat((prompt.position_ids, positions), dim=-1),
            input_ids=torch.cat((prompt.input_ids, torch.tensor([new])), dim=1),
            visual_mask=torch.nn.functional.pad(prompt.visual_mask, (0, count)),
            lengths=(prompt.lengths[0] + count,),
            deepstack=tuple(torch.nn.functional.pad(level, (0, 0, 0, count)) for level in prompt.deepstack),
        )
        per_token, masks = slice_tokens(base.token_inputs(whole), 1, whole.lengths[0]), base.masks()
        hidden = base.run_layers(whole.hidden[:, 1:], 0, TRUNK, per_token, masks)
        return int(twig.logits(twig(hidden, per_token, masks)[0, -1:]).argmax())

    done = 1  # the prefill's own token
    while done < len(answer):
        drafts: list[int] = []
        while len(drafts) < DRAFTED:
            drafts.append(next_token([*answer[:done], *drafts]))
        right = 0
        while right < DRAFTED and done + right < len(answer) and drafts[right] == answer[done + right]:
            right += 1
        steps, accepted, done = steps + 1, accepted + right, done + right + 1
    return steps, accepted


@pytest.fixture
def picture(tmp_path):
    made = Image.radial_gradient("L").convert("RGB").resize((140, 112))
    made.save(tmp_path / "picture.png")
    return made


def options_of(kind, folder):
    options = {
        "model": str(folder / "base"),
        "max_model_len": 256,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "environment": {"VLLM_USE_V2_MODEL_RUNNER": "0"},
        "pictures": [str(folder / "picture.png")],
    }
    if kind == "Qwen2VL":
        options["hf_overrides"] = {"image_token_index": WORDS.index(IMAGE)}
    return options


@pytest.mark.parametrize("kind", ["Qwen2_5_VL", "Qwen2VL", "Qwen3VL"])
def test_drafts_are_those_of_the_twig_in_the_slots(engine, tmp_path, picture, kind):
    drafter = tmp_path / "drafter"
    model = write(kind, tmp_path / "base", drafter)
    options = options_of(kind, tmp_path)
    prompts = [{"text": text, "pictures": [0], "tokens": TOKENS} for text in TEXTS]
    jobs = [{"name": "alone", "prompts": prompts}, {"name": "together", "prompts": prompts, "together": True}]
    results = engine(jobs, drafter=str(drafter), **options)
    from tests.vllm.tiny_qwen import processor

    steps, accepted = 0, 0
    for text, ids in zip(TEXTS, results["alone"]["ids"], strict=True):
        inputs = processor(kind)(text=text, images=picture, return_tensors="pt")
        with model.disabled():
            plain = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        assert plain[0, inputs["input_ids"].shape[1] :].tolist() == ids
        more = accepted_in_slots(model, dict(inputs), ids)
        steps, accepted = steps + more[0], accepted + more[1]
    assert results["together"]["ids"] == results["alone"]["ids"]
    made = results["alone"]["drafts"]
    print(f"\n{kind}: vLLM {made['accepted_tokens']} in {made['drafts']} steps, the twig {accepted} in {steps}")
    assert made["accepted_tokens"] >= 0.97 * accepted
    assert accepted > 0


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("kind", ["Qwen2_5_VL", "Qwen2VL"])
def test_scout_mode_answers_as_twigvlm_s(engine, tmp_path, picture, kind, drafted):
    """Of a picture of 5 × 4 tokens the best ones, at their places on three axes."""
    from tests.vllm.tiny_qwen import processor
    from twigvlm.cli.export import scout_overrides

    model, own = write(kind, tmp_path / "base", tmp_path / "drafter"), processor(kind)
    options = options_of(kind, tmp_path)
    scout = scout_overrides(model, own, str(tmp_path / "drafter"), 12)
    options["hf_overrides"] = {**options.get("hf_overrides", {}), **scout}
    questions = [f"w{n} w{n + 5} w3" for n in range(8, 16)]
    kept = [{"keep": 5}, {"keep": 9}, {"retain": 14, "diverse": True}]
    asked = [(question, how) for question in questions for how in kept]
    prompts, expected = [], []
    for question, how in asked:
        text = f"{START} {IMAGE} {END} {question} w7"
        prompts.append({"text": text, "pictures": [0], "tokens": TOKENS, "processor": {"question": question, **how}})
        inputs = own(text=text, images=picture, return_tensors="pt")
        ids = model.generate(**inputs, **how, scout=True, max_new_tokens=TOKENS, do_sample=False)
        expected.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    jobs = [{"name": "alone", "prompts": prompts}, {"name": "together", "prompts": prompts, "together": True}]
    drafts = {"drafter": str(tmp_path / "drafter"), "tokens": DRAFTED} if drafted else {"tokens": 0}
    results = engine(jobs, **drafts, **options)
    assert results["alone"]["ids"] == expected
    assert results["together"]["ids"] == expected
    lengths = results["alone"]["prompt_tokens"]
    assert [length - lengths[0] for length in lengths[:2]] == [0, 4]
    assert len({tuple(ids) for ids in expected[:3]}) > 1  # what is kept does matter
