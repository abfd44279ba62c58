"""Steps b and d: teach the language model to talk about what visual tokens say, by low-rank updates.

Step b needs no pixels: visual tokens are the targets of `targets.py`, made from labels. Step d puts the trained tower and
projector in their place. Questions about one picture share its visual tokens: a block of text sees the picture and itself, not
the others.

    python -m recipes.sapling.language --output runs/symbolic --steps 1500
    python -m recipes.sapling.language --output runs/joint --steps 600 --start runs/symbolic --vision runs/vision
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, set_seed

from recipes.sapling.questions import Turn, conversation
from recipes.sapling.run import train
from recipes.sapling.scenes import GRID, _rng, make_scene, patch_labels, render
from recipes.sapling.targets import VisualTargets
from recipes.sapling.vision import DenseVision, pixels
from twigvlm.sapling import assemble

PREFIX = "<|im_start|>user\n"
RANK, SCALING = 24, 2
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DESCRIPTION_WEIGHT = 0.5
IGNORE = -100


def _blocks(turns: list[Turn], together: bool) -> Iterator[list[Turn]]:
    """One block per turn, or conversations of up to four turns."""
    step = 4 if together else 1
    for start in range(0, len(turns), step):
        yield turns[start : start + step]


@dataclass(frozen=True)
class Conversations(Dataset):
    """Scenes with their questions, tokenised; pictures only where `pictures` asks for them."""

    tokenizer: PreTrainedTokenizerBase
    split: str
    first: int
    count: int
    turns: int
    visual_tokens: int
    pictures: bool

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        index = self.first + position
        scene = make_scene(self.split, index)
        rng = _rng(self.split, index, purpose=11)
        labels = {key: torch.from_numpy(value).flatten() for key, value in asdict(patch_labels(scene)).items()}
        telling = ((labels["centre"] > 0.2) | (labels["character"] > 0)).float().numpy()
        order = np.argsort(-telling - rng.random(GRID * GRID) * 0.5)
        kept = (
            self.visual_tokens if self.visual_tokens == GRID * GRID else int(self.visual_tokens * rng.uniform(0.7, 1.3))
        )
        place = torch.from_numpy(np.sort(order[:kept]))
        ids, targets, block, position_ids, weights = [], [], [], [], []
        for number, turns in enumerate(_blocks(conversation(scene, self.turns), rng.random() < 0.2)):
            offset = len(self.tokenizer(PREFIX).input_ids) + GRID * GRID
            for n, turn in enumerate(turns):
                opening = "\n" if n == 0 else "\n" + PREFIX
                question = self.tokenizer(f"{opening}{turn.question}<|im_end|>\n<|im_start|>assistant\n").input_ids
                answer = self.tokenizer(f"{turn.answer}<|im_end|>").input_ids
                tokens = question + answer
                ids += tokens
                targets += [IGNORE] * len(question) + answer
                block += [number + 1] * len(tokens)
                position_ids += range(offset, offset + len(tokens))
                weights += [DESCRIPTION_WEIGHT if turn.kind == "description" else 1.0] * len(tokens)
                offset += len(tokens)
        item = {
            "place": place,
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(targets),
            "block": torch.tensor(block),
            "positions": torch.tensor(position_ids),
            "weights": torch.tensor(weights),
            **labels,
        }
        if self.pictures:
            item["pixel_values"] = pixels(render(scene))
        return item


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    padding = {"place": -1, "labels": IGNORE, "block": -1}
    return {
        key: pad_sequence([item[key] for item in items], batch_first=True, padding_value=padding.get(key, 0))
        for key in items[0]
    }


class Reader(nn.Module):
    """The language model with trainable low-rank updates, fed with visual tokens and blocks of text."""

    def __init__(self, targets: VisualTargets, tokenizer: PreTrainedTokenizerBase, vision: DenseVision | None) -> None:
        super().__init__()
        language = assemble.language_model().to(torch.bfloat16)
        language.set_attn_implementation("eager")
        lora = LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
        self.language = get_peft_model(language, lora)
        self.targets = targets
        self.vision = vision
        self.register_buffer("prefix", torch.tensor(tokenizer(PREFIX).input_ids))
        if vision is not None:
            vision.requires_grad_(False)

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """What is learned, and nothing of the frozen models."""
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in self.learned()}

    def load_state_dict(self, *args: object, **kwargs: object) -> object:
        """Take up what was learned; the frozen models are not missed."""
        kwargs["strict"] = False
        result = super().load_state_dict(args[0], **kwargs)
        assert not result.unexpected_keys, result.unexpected_keys
        return result._replace(missing_keys=[key for key in result.missing_keys if key in self.learned()])

    def learned(self) -> set[str]:
        return {name for name, value in self.named_parameters() if value.requires_grad}

    def visual_tokens(self, place: Tensor, pixel_values: Tensor | None, **labels: Tensor) -> Tensor:
        index = place.clamp(min=0)
        if self.vision is None:
            chosen = {key: value.gather(1, index) for key, value in labels.items()}
            exact = self.targets(place=index, **chosen)
            noise = torch.randn_like(exact) * self.targets.norm / exact.shape[-1] ** 0.5
            return exact + noise * 0.2 * torch.rand(len(exact), 1, 1)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            everywhere = torch.arange(GRID * GRID).expand(len(place), -1)
            features = self.vision.features(pixel_values, everywhere)
            features = features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))
            return self.vision.multi_modal_projector(features.float())

    def forward(
        self,
        place: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        block: Tensor,
        positions: Tensor,
        weights: Tensor,
        kind: Tensor,
        centre: Tensor,
        colour: Tensor,
        character: Tensor,
        pixel_values: Tensor | None = None,
    ) -> dict[str, Tensor]:
        model = self.language.get_base_model()
        batch, start = len(input_ids), len(self.prefix)
        embed = model.get_input_embeddings()
        visual = self.visual_tokens(
            place, pixel_values, kind=kind, centre=centre, colour=colour, character=character
        ).to(torch.bfloat16)
        prefix = self.prefix.expand(batch, -1)
        hidden = torch.cat([embed(prefix), visual, embed(input_ids)], dim=1)
        position_ids = torch.cat([torch.arange(start).expand(batch, -1), place.clamp(min=0) + start, positions], dim=1)
        # Blocks: 0 is the picture with its prefix, 1.. are the texts, -1 is padding.
        blocks = torch.cat([torch.zeros_like(prefix), torch.where(place < 0, -1, 0), block], dim=1)
        same = blocks[:, :, None] == blocks[:, None, :]
        seen = (same | (blocks[:, None, :] == 0)) & (position_ids[:, :, None] >= position_ids[:, None, :])
        seen |= torch.eye(blocks.shape[1], dtype=torch.bool)
        mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
        with torch.autocast("cpu", torch.bfloat16):
            output = model.model(
                inputs_embeds=hidden, attention_mask=mask[:, None], position_ids=position_ids, use_cache=False
            ).last_hidden_state[:, -input_ids.shape[1] :]
            answered = labels[:, 1:] != IGNORE
            logits = model.lm_head(output[:, :-1][answered]).float()
        wanted, weight = labels[:, 1:][answered], weights[:, 1:][answered]
        losses = nn.functional.cross_entropy(logits, wanted, reduction="none")
        right = logits.argmax(-1) == wanted
        return {"loss": (losses * weight).sum() / weight.sum(), "right": right, "weight": weight}


@torch.inference_mode()
def report(model: Reader, data: Conversations) -> str:
    """Token accuracy (teacher forced) on held-out scenes, short answers and descriptions apart."""
    right = {True: [], False: []}
    for start in range(0, len(data), 4):
        output = model(**collate([data[i] for i in range(start, min(start + 4, len(data)))]))
        for correct, weight in zip(output["right"].tolist(), output["weight"].tolist(), strict=True):
            right[weight == 1.0].append(correct)
    return f"short answers' tokens {np.mean(right[True]):.4f}, descriptions' tokens {np.mean(right[False]):.4f}"


@dataclass
class Options:
    output: str
    """Folder of checkpoints; an interrupted run goes on from the newest."""
    steps: int = 1500
    batch: int = 4
    rate: float = 1e-3
    turns: int = 12
    """Short questions per scene, beside one description."""
    visual_tokens: int = 72
    """Mean number of visual tokens shown, the telling ones first; 576 shows all."""
    first: int = 0
    """Index of the first training scene."""
    start: str | None = None
    """Folder of an earlier run whose updates to start from."""
    vision: str | None = None
    """Folder of the vision run; without it visual tokens come from labels."""
    threads: int = 1


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    set_seed(0)
    text = assemble.tokenizer()
    language = assemble.language_model()
    targets = VisualTargets(language.get_input_embeddings().weight.detach(), text)
    vision = None
    if options.vision:
        vision = DenseVision(targets, assemble.config(language, text.convert_tokens_to_ids(assemble.IMAGE_TOKEN)))
        vision.load_state_dict(load_file(Path(options.vision) / "final.safetensors"))
    del language
    model = Reader(targets, text, vision)
    if options.start:
        model.load_state_dict(load_file(Path(options.start) / "final.safetensors"))

    def scenes(split: str, first: int, count: int) -> Conversations:
        return Conversations(text, split, first, count, options.turns, options.visual_tokens, bool(options.vision))

    data = scenes("train", options.first, options.steps * options.batch)
    train(model, data, options.output, options.steps, options.batch, options.rate, warmup=30, collate=collate)
    print("validation:", report(model.eval(), scenes("validation", 0, 100)))


if __name__ == "__main__":
    main(tyro.cli(Options))
