"""The recipe's training pieces: what a visual token should say, and who sees whom."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM

from recipes.sapling.export_weights import shipped
from recipes.sapling.language import IGNORE, Conversations, Reader, collate
from recipes.sapling.scenes import GRID, KINDS
from recipes.sapling.targets import VisualTargets
from recipes.sapling.unpack_weights import low_rank_updates
from recipes.sapling.vision import Crops, DenseVision
from tests.tiny import tiny_text
from twigvlm.sapling import assemble

TEXT = tiny_text(vocab_size=256, hidden_size=48)


class Letters:
    """A tokenizer of bytes."""

    def __call__(self, text, add_special_tokens=True):
        return type("Encoded", (), {"input_ids": list(text.encode("utf8"))})


@pytest.fixture(scope="module")
def targets():
    torch.manual_seed(0)
    return VisualTargets(torch.randn(256, 48), Letters())


def test_a_centre_says_its_thing_and_a_border_hardly(targets):
    kind = torch.tensor([[3, 3, 0]])
    said = targets(
        kind=kind,
        centre=torch.tensor([[1.0, 0.0, 0.0]]),
        colour=torch.tensor([[-1, -1, 0]]),
        character=torch.zeros(1, 3, dtype=torch.long),
        place=torch.tensor([[0, 0, 0]]),
    )
    likeness = (said - targets.places[0]) @ targets.kinds[3] / targets.norm**2
    assert likeness[0, 0] > 0.8 > 0.4 > likeness[0, 1]
    assert len(targets.kinds) == len(KINDS) + 2


def test_places_differ_and_mix(targets):
    places = targets.places.view(GRID, GRID, -1)
    assert not torch.allclose(places[0, 0], places[0, -1])
    middle = (places[0, 0] + places[0, -1]) / 2
    assert places[0, GRID // 2] @ places[0, 0] > 0
    assert torch.isfinite(middle).all()


def test_labels_are_answers_and_blocks_start_after_the_picture():
    data = Conversations(Letters(), "train", 0, 4, turns=5, visual_tokens=40, pictures=False)
    batch = collate([data[0], data[1]])
    text = bytes(batch["labels"][batch["labels"] != IGNORE].tolist()).decode()
    assert text.count("<|im_end|>") >= 10
    assert "?" not in text
    there = batch["block"] >= 0
    starts = there & (batch["block"] != batch["block"].roll(1, 1))
    assert (batch["positions"][starts] == len(b"<|im_start|>user\n") + GRID * GRID).all()
    assert (batch["place"].diff() > 0).all()
    assert batch["place"].shape == (2, 40)
    assert batch["picture"].tolist() == [0] * len(data[0]["rows"]) + [1] * len(data[1]["rows"])


@torch.no_grad()
def test_coordinates_pass_the_tower_and_the_projector_tells_them(targets):
    torch.manual_seed(0)
    model = DenseVision(targets, assemble.config(LlamaForCausalLM(TEXT), image_token_id=5)).eval()
    item = Crops("validation", 336, 0, 1, random_text=0.5)[0]

    def nearer_to_its_own_place():
        said = model.multi_modal_projector(model.features(item["pixel_values"][None], item["place"][None]))[0]
        own, opposite = targets.places, targets.places.flip(0)
        return ((said - own).square().sum(-1) < (said - opposite).square().sum(-1)).float().mean()

    assert nearer_to_its_own_place() < 0.7
    model.lay_coordinates(Crops("train", 336, 0, 6, random_text=0.5), count=6)
    assert nearer_to_its_own_place() > 0.9


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21 asks for it
def test_what_is_shipped_can_be_trained_on(targets, monkeypatch, tmp_path):
    monkeypatch.setattr(assemble, "language_model", lambda: LlamaForCausalLM(TEXT))
    reader = Reader(targets, Letters(), None)
    learned = {name: torch.randn_like(value).half().float() for name, value in reader.state_dict().items()}
    tower = {
        "vision_tower.a": torch.ones(2),
        "multi_modal_projector.b": torch.ones(2),
        "heads.kind.bias": torch.ones(2),
    }
    for name, state in (("joint", learned), ("vision", tower)):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "final.safetensors")
    weights = shipped(tmp_path / "joint", tmp_path / "vision")
    assert "heads.kind.bias" not in weights
    again = low_rank_updates(reader, {name: value.float() for name, value in weights.items()})
    assert again.keys() == learned.keys()
    assert all(torch.equal(again[name], learned[name]) for name in learned)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21 asks for it
def test_a_block_does_not_see_the_others(targets, monkeypatch):
    """Changing one question leaves the losses of all other blocks as they were."""
    torch.manual_seed(0)
    monkeypatch.setattr(assemble, "language_model", lambda: LlamaForCausalLM(TEXT))
    reader = Reader(targets, Letters(), None).eval()
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    data = Conversations(Letters(), "train", 0, 8, turns=4, visual_tokens=30, pictures=False)
    batch = collate([data[0], data[1]])
    assert (batch["block"] == 0).sum(1).max() < batch["block"].shape[1], "blocks should share rows here"
    changed = {key: value.clone() for key, value in batch.items()}
    first = (batch["block"] == 0) & (batch["labels"] == IGNORE) & (batch["picture"] == 0)[:, None]
    changed["input_ids"][first] = (changed["input_ids"][first] + 1) % 256

    def losses(inputs):
        found = []
        original = nn.functional.cross_entropy
        monkeypatch.setattr(
            nn.functional, "cross_entropy", lambda *args, **kwargs: found.append(original(*args, **kwargs)) or found[-1]
        )
        reader(**inputs)
        monkeypatch.setattr(nn.functional, "cross_entropy", original)
        return found[0]

    before, after = losses(batch), losses(changed)
    answered = batch["labels"][:, 1:] != IGNORE
    in_first = ((batch["block"] == 0) & (batch["picture"] == 0)[:, None])[:, 1:][answered]
    assert torch.equal(before[~in_first], after[~in_first])
    assert not torch.allclose(before[in_first], after[in_first])
