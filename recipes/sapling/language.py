"""Steps b and d: teach the language model to talk about what visual tokens say, by low-rank updates.

Step b needs no pixels: visual tokens are the targets of `targets.py`, made from labels. Step d puts the trained tower and
projector in their place. A picture passes the layers once for all of its questions: a block of text sees the picture and itself,
not the other blocks.

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
from transformers import DynamicCache, PreTrainedTokenizerBase, set_seed

from recipes.sapling.pictures import render
from recipes.sapling.questions import conversation
from recipes.sapling.scenes import GRID, make_scene, patch_labels, scene_rng
from recipes.sapling.targets import VisualTargets
from recipes.sapling.train_loop import train
from recipes.sapling.turns import Turn
from recipes.sapling.vision import DenseVision, pixels
from twigvlm.sapling import assemble

PREFIX = "<|im_start|>user\n"
RANK, SCALING = 24, 2
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DESCRIPTION_WEIGHT = 0.5
IGNORE = -100
ROW = 128  # tokens of the blocks that share a row; a longer block has a row of its own


def _blocks(turns: list[Turn], together: bool) -> Iterator[list[Turn]]:
    """One block per turn, or conversations of up to four turns."""
    step = 4 if together else 1
    for start in range(0, len(turns), step):
        yield turns[start : start + step]


def _rows(blocks: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Blocks put end to end in as few rows as first fit finds."""
    rows: list[list[dict[str, Tensor]]] = []
    for block in blocks:
        fitting = (row for row in rows if sum(len(other["labels"]) for other in row) + len(block["labels"]) <= ROW)
        row = next(fitting, None)
        if row is None:
            rows.append([block])
        else:
            row.append(block)
    return [{key: torch.cat([block[key] for block in row]) for key in row[0]} for row in rows]


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

    def __getitem__(self, position: int) -> dict[str, Tensor | list[dict[str, Tensor]]]:
        index = self.first + position
        scene = make_scene(self.split, index)
        rng = scene_rng(self.split, index, purpose=11)
        labels = {key: torch.from_numpy(value).flatten() for key, value in asdict(patch_labels(scene)).items()}
        telling = ((labels["centre"] > 0.2) | (labels["character"] > 0)).float().numpy()
        order = np.argsort(-telling - rng.random(GRID * GRID) * 0.5)
        item = {"place": torch.from_numpy(np.sort(order[: self.visual_tokens])), **labels}
        if self.pictures:
            item["pixel_values"] = pixels(render(scene))
        blocks = _blocks(conversation(scene, self.turns), together=rng.random() < 0.2)
        return item | {"rows": _rows([self._tokens(turns, number) for number, turns in enumerate(blocks)])}

    def _tokens(self, turns: list[Turn], number: int) -> dict[str, Tensor]:
        """One block of text, which starts right after the picture."""
        ids, labels, weights = [], [], []
        for n, turn in enumerate(turns):
            opening = "\n" if n == 0 else "\n" + PREFIX
            question = self.tokenizer(f"{opening}{turn.question}<|im_end|>\n<|im_start|>assistant\n").input_ids
            answer = self.tokenizer(f"{turn.answer}<|im_end|>").input_ids
            ids += question + answer
            labels += [IGNORE] * len(question) + answer
            weights += [DESCRIPTION_WEIGHT if turn.kind == "description" else 1.0] * (len(question) + len(answer))
        start = len(self.tokenizer(PREFIX).input_ids) + GRID * GRID
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "weights": torch.tensor(weights),
            "positions": torch.arange(start, start + len(ids)),
            "block": torch.full((len(ids),), number),
        }


def collate(items: list[dict[str, Tensor | list[dict[str, Tensor]]]]) -> dict[str, Tensor]:
    """Pictures stacked; rows of all pictures padded to one length, `picture` telling whose they are."""
    rows = [row for item in items for row in item["rows"]]
    padding = {"labels": IGNORE, "block": -1}
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0] if key != "rows"}
    batch |= {
        key: pad_sequence([row[key] for row in rows], batch_first=True, padding_value=padding.get(key, 0))
        for key in rows[0]
    }
    return batch | {"picture": torch.tensor([n for n, item in enumerate(items) for _ in item["rows"]])}


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
        if self.vision is None:
            chosen = {key: value.gather(1, place) for key, value in labels.items()}
            exact = self.targets(place=place, **chosen)
            noise = torch.randn_like(exact) * self.targets.norm / exact.shape[-1] ** 0.5
            return exact + noise * 0.2 * torch.rand(len(exact), 1, 1)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            everywhere = torch.arange(GRID * GRID).expand(len(place), -1)
            features = self.vision.features(pixel_values, everywhere)
            features = features.gather(1, place[..., None].expand(-1, -1, features.shape[-1]))
            return self.vision.multi_modal_projector(features.float())

    def forward(
        self,
        place: Tensor,
        picture: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        weights: Tensor,
        positions: Tensor,
        block: Tensor,
        kind: Tensor,
        centre: Tensor,
        colour: Tensor,
        character: Tensor,
        pixel_values: Tensor | None = None,
    ) -> dict[str, Tensor]:
        model = self.language.get_base_model()
        embed, start = model.get_input_embeddings(), len(self.prefix)
        visual = self.visual_tokens(
            place, pixel_values, kind=kind, centre=centre, colour=colour, character=character
        ).to(torch.bfloat16)
        opening = torch.cat([embed(self.prefix).expand(len(visual), -1, -1), visual], dim=1)
        opening_positions = torch.cat([torch.arange(start).expand(len(visual), -1), place + start], dim=1)
        seen = (block[:, :, None] == block[:, None, :]).tril()
        seen = torch.cat([torch.ones(*block.shape, opening.shape[1], dtype=torch.bool), seen], dim=-1)
        mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
        with torch.autocast("cpu", torch.bfloat16):
            cache = DynamicCache()
            model.model(inputs_embeds=opening, position_ids=opening_positions, past_key_values=cache)
            cache.batch_select_indices(picture)
            output = model.model(
                inputs_embeds=embed(input_ids),
                attention_mask=mask[:, None],
                position_ids=positions,
                past_key_values=cache,
            ).last_hidden_state
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
    """Number of visual tokens shown, the telling ones first; 576 shows all."""
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
