"""Scout mode's and the drafter's classes on stand-ins for vLLM's."""

import ast
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.integrations.vllm_stubs import PLUGIN, stubbed
from twigvlm.integrations.vllm.layout import FORMAT

IMAGE, WIDTH = 9, 4


def methods(path):
    """Methods of the classes of a file, and whether they are there to be overridden."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    yield method.name, any(isinstance(part, ast.Raise) for part in method.body)


def test_each_scout_defines_what_the_shared_classes_leave_open():
    left = {name for name, is_open in methods(PLUGIN / "scout.py") if is_open}
    assert left >= {"_visual", "_offsets_in_pictures", "_patches", "_part"}
    files = sorted(PLUGIN.glob("scout_*.py"))
    assert len(files) == 2
    for path in files:
        assert left <= {name for name, _ in methods(path)}, path.name


def configured(path, **options):
    """vLLM's configuration, as far as scout mode looks at it, of an engine with the export at `path`."""
    multimodal = SimpleNamespace(video_pruning_rate=options.get("rate"))
    vision = SimpleNamespace(image_size=4, patch_size=2, spatial_merge_size=2)
    settings = {"path": path, "trunk_layers": options.get("trunk_layers", 2)}
    config = SimpleNamespace(
        vision_config=vision, vision_feature_select_strategy="default", image_token_id=IMAGE, twig_scout=settings
    )
    model = SimpleNamespace(get_multimodal_config=lambda: multimodal, dtype=torch.float32, hf_config=config)
    model.hf_text_config = SimpleNamespace(hidden_size=WIDTH)
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        compilation_config=SimpleNamespace(cudagraph_mm_encoder=options.get("captured", False)),
        model_config=model,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=32),
    )


class Base(nn.Module):
    """A base whose tower gives each patch its picture's pixel, and notes how many patches it sees at once."""

    merged = 1

    def __init__(self, *, vllm_config, prefix):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.language_model = nn.Module()
        self.language_model.embedding = nn.Embedding(10, WIDTH)
        self.language_model.embed_input_ids = self.language_model.embedding.forward
        self.seen = []

    def load_weights(self, weights):
        return set(weights)


class Llava(Base):
    def embed_multimodal(self, pixel_values):
        self.seen.append(4 * len(pixel_values))
        return pixel_values[:, None, None].expand(-1, 4, WIDTH)


class Qwen(Base):
    def embed_multimodal(self, pixel_values, image_grid_thw):
        patches = image_grid_thw.prod(-1)
        assert len(pixel_values) == int(patches.sum())
        self.seen.append(len(pixel_values))
        return [part[::4, None].expand(-1, WIDTH) for part in pixel_values.split(patches.tolist())]


@pytest.fixture
def export(tmp_path):
    """Directory of an export, of which only the config is there."""
    record = {"format": FORMAT, "base": {"hidden_size": WIDTH}, "trunk_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps({"twigvlm": record}))
    return str(tmp_path)


@pytest.fixture
def scouts(monkeypatch, export):
    """`scouts(name)`: a scout on such a base, whose ranking keeps a picture's last tokens, and the folders that were loaded."""
    with stubbed(LlavaForConditionalGeneration=Llava, Qwen2VLForConditionalGeneration=Qwen) as module:
        loaded = []

        def ranking(folder, dtype, device):
            loaded.append(folder)
            return lambda embedded, visual, positions, keep, select: torch.arange(int(visual.sum()))[-keep:]

        monkeypatch.setattr(module("scout"), "Ranking", ranking)
        monkeypatch.setattr(module("scout"), "PATCHES", 10)

        def make(name, **options):
            kind = {"llava": ("scout_llava", "ScoutLlava"), "qwen": ("scout_qwen", "ScoutQwen2")}[name]
            return getattr(module(kind[0]), kind[1])(vllm_config=configured(export, **options)), loaded

        yield make


def asked(keeps):
    ids = torch.tensor([[1, IMAGE, 2, 3]] * len(keeps))
    return {"scout_ids": ids, "scout_keep": torch.tensor(keeps), "scout_diverse": torch.zeros(len(keeps)).bool()}


def test_pictures_of_one_size_are_seen_and_ranked_in_parts(scouts):
    scout, _ = scouts("llava")
    assert scout.positions.shape == (3, scout.offsets.shape[1] + 1)
    scouted = scout.embed_multimodal(pixel_values=torch.arange(5.0), **asked([1, 2, 3, 4, 1]))
    assert scout.seen == [8, 8, 4]
    assert [features[0, 0].item() for features in scouted] == [0, 1, 2, 3, 4]
    assert [features[:, -1].tolist() for features in scouted] == [[3], [2, 3], [1, 2, 3], [0, 1, 2, 3], [3]]


def test_pictures_of_all_sizes_are_seen_and_ranked_in_parts(scouts):
    scout, _ = scouts("qwen")
    sizes = torch.tensor([[1, 2, 2], [1, 2, 2], [1, 4, 4], [1, 2, 4]])
    pixels = torch.arange(4.0).repeat_interleave(sizes.prod(-1))
    scouted = scout.embed_multimodal(pixel_values=pixels, image_grid_thw=sizes, **asked([1, 1, 3, 2]))
    assert scout.seen == [8, 16, 8]  # one that is larger than a part goes alone
    assert [features[0, 0].item() for features in scouted] == [0, 1, 2, 3]
    rows, columns = (scouted[2][:, column].tolist() for column in (WIDTH + 3, WIDTH + 5))
    assert (rows, columns) == ([0, 1, 1], [1, 0, 1])


def test_a_picture_that_is_kept_whole_is_not_ranked(scouts):
    scout, loaded = scouts("llava")
    (features,) = scout.embed_multimodal(pixel_values=torch.arange(1.0), **asked([4]))
    assert features[:, -1].tolist() == [0, 1, 2, 3]
    assert loaded == []


def test_the_ranking_is_there_whatever_loads_the_model(scouts, export):
    scout, loaded = scouts("llava")
    assert loaded == []
    for _ in range(2):  # as with --load-format dummy
        scout.embed_multimodal(pixel_values=torch.arange(1.0), **asked([2]))
        assert loaded == [export]
    scout, loaded = scouts("llava")
    loaded.clear()
    assert scout.load_weights(["w"]) == {"w"}
    assert loaded == [export]
    assert [*dict(scout.named_modules())] == ["", "language_model", "language_model.embedding"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"captured": True}, "cudagraph_mm_encoder=true"),
        ({"rate": 0.5}, "--video-pruning-rate 0.5"),
        ({"trunk_layers": 3}, "the export has changed"),
    ],
)
def test_options_that_scout_mode_does_not_know_are_refused(scouts, options, words):
    with pytest.raises(ValueError, match=words):
        scouts("qwen", **options)


class Tokenizer:
    """One that puts its first token before every text, unless it is told not to, and has a word for each character."""

    bos_token = "^"

    def __call__(self, text, add_special_tokens=True):
        words = {"^": 1, "#": IMAGE, "?": 5}
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [words[character] for character in text])


@pytest.mark.parametrize("prompt", ["^#{question}", "#{question}"], ids=["template-begins", "tokenizer-begins"])
def test_the_prompt_that_pictures_are_ranked_in_has_one_first_token(prompt):
    settings = {"prompt": prompt, "question": "?"}
    with stubbed() as module:
        processor = object.__new__(module("scout").ScoutProcessor)
        config = SimpleNamespace(twig_scout=settings)
        processor.info = SimpleNamespace(get_hf_config=lambda: config, get_tokenizer=Tokenizer)
        assert processor._question({}) == [1, IMAGE, 5]


def test_the_second_runner_is_refused_where_positions_have_three_axes():
    record = {"format": FORMAT, "base": {}}
    draft = SimpleNamespace(hf_config=SimpleNamespace(twigvlm=record))
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(draft_model_config=draft),
        model_config=SimpleNamespace(hf_text_config=None, uses_mrope=True),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        use_v2_model_runner=True,
    )
    with stubbed() as module, pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        module("drafter").TwigDrafter(vllm_config=config)


@pytest.mark.parametrize(
    ("record", "drafted", "mapped"),
    [({"maps": True}, 8, True), ({"maps": False}, 8, False), ({}, 8, False), ({}, 5, True)],
    ids=["reordered", "the-target-s", "older-and-the-target-s", "older-and-reduced"],
)
def test_a_drafter_has_the_map_of_its_vocabulary_where_the_export_has_one(record, drafted, mapped):
    entry = {"format": FORMAT, "base": {}, "trunk_layers": 2, "head": True, "deepstack_levels": 0, **record}
    draft = SimpleNamespace(twigvlm=entry, draft_vocab_size=drafted, vocab_size=8, hidden_size=WIDTH, rms_norm_eps=1e-6)
    draft.num_hidden_layers = 0
    model = SimpleNamespace(hf_text_config=None, uses_mrope=False, get_total_num_hidden_layers=lambda: 6)
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=draft)),
        model_config=model,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=32),
    )
    with stubbed() as module:
        drafter = module("drafter").TwigDrafter(vllm_config=config)
    assert ("draft_id_to_target_id" in dict(drafter.named_parameters())) == mapped


def test_a_draft_begins_at_positions_and_goes_on_at_indices():
    """Of a request that is 90 positions further on than its 9 tokens."""
    layer = SimpleNamespace(query_start_loc=torch.tensor([0, 2]), seq_lens=torch.tensor([9]))
    context = SimpleNamespace(attn_metadata={"first": layer})
    with stubbed(get_forward_context=lambda: context) as module:
        drafter = object.__new__(module("drafter").TwigDrafter)
        nn.Module.__init__(drafter)
        attention = SimpleNamespace(attn=SimpleNamespace(layer_name="first"))
        drafter.model = SimpleNamespace(layers=[SimpleNamespace(self_attn=attention)])
        drafter._begins = False
        for _ in range(2):  # drafts
            buffer = torch.tensor([97, 98]).repeat(3, 1)
            drafter.combine_hidden_states(torch.zeros(2, WIDTH))
            assert drafter._following(buffer).tolist() == [[98, 99]] * 3
            assert buffer.tolist() == [[7, 8]] * 3
            for step in range(2):
                assert drafter._following(torch.tensor([[9 + step]] * 3)).tolist() == [[100 + step]] * 3
        context.attn_metadata = None
        assert drafter._following(torch.tensor([[3]] * 3)).tolist() == [[4]] * 3
