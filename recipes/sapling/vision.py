r"""Steps a and c: grow the vision tower and the projector by dense supervision.

Every patch predicts what it shows, and the projector's output is pulled to the embedding that `targets.py` gives it. Small
crops first: they are ten times cheaper than whole scenes, and the place comes from a random window of the position embeddings.

    python -m recipes.sapling.vision --output runs/crops --steps 3000
    python -m recipes.sapling.vision --output runs/whole --size 336 --start runs/crops --sharpen 1.5 --batch 8 --rate 2.5e-4
    python -m recipes.sapling.vision --output runs/vision --size 336 --start runs/whole --batch 8 --rate 7e-4 --coordinates \
        --freeze-tower
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModel, set_seed
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from recipes.sapling.pictures import render
from recipes.sapling.scenes import CHARACTERS, COLOURS, GRID, PATCH, SIGN_KIND, SIZE, make_scene, patch_labels
from recipes.sapling.targets import VisualTargets
from recipes.sapling.train_loop import train
from twigvlm.sapling import assemble


def pixels(image: object) -> Tensor:
    """RGB picture -> (3, height, width) in [-1, 1], as Sapling's processor does."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


@dataclass(frozen=True)
class Crops(Dataset):
    """Scenes of one size with the labels of their patches, at random windows of the whole grid."""

    split: str
    size: int
    first: int
    count: int
    random_text: float

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        index = self.first + position
        scene = make_scene(self.split, index, self.size, self.random_text)
        labels = {key: torch.from_numpy(value).flatten() for key, value in asdict(patch_labels(scene)).items()}
        grid = self.size // PATCH
        row, column = np.random.default_rng(index).integers(0, GRID - grid + 1, 2)
        place = ((row + torch.arange(grid))[:, None] * GRID + column + torch.arange(grid)).flatten()
        return {"pixel_values": pixels(render(scene)), "place": place, **labels}


def _weights(kind: Tensor, centre: Tensor, character: Tensor) -> Tensor:
    """How much the targets of patches count."""
    return 1 + 3 * (kind > 0) + 12 * centre + 12 * (character > 0)


def _ridge(inputs: Tensor, outputs: Tensor, weights: Tensor) -> Tensor:
    """Weights and, last, biases of the linear map from inputs to outputs with the least weighted square error."""
    extended = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1).double()
    weighted = extended * weights[:, None]
    gram = weighted.T @ extended
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram, weighted.T @ outputs.double()).T.float()


class DenseVision(nn.Module):
    """Tower, projector, and the heads that are thrown away after training."""

    def __init__(self, targets: VisualTargets, config: assemble.LlavaConfig, attention: str = "sdpa") -> None:
        super().__init__()
        self.vision_tower = AutoModel.from_config(config.vision_config, attn_implementation=attention)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        width = config.vision_config.hidden_size
        self.heads = nn.ModuleDict(
            {
                "kind": nn.Linear(width, SIGN_KIND + 1),
                "character": nn.Linear(width, len(CHARACTERS) + 1),
                "colour": nn.Linear(width, len(COLOURS)),
                "centre": nn.Linear(width, 1),
            }
        )
        self.targets = targets

    def sharpen(self, factor: float) -> None:
        """Scale all queries: attention learned over few patches is too flat over many, as log(many) / log(few) measures."""
        with torch.no_grad():
            for layer in self.vision_tower.encoder.layers:
                layer.self_attn.q_proj.weight *= factor
                layer.self_attn.q_proj.bias *= factor

    @torch.no_grad()
    def lay_coordinates(self, pictures: Dataset, count: int = 120) -> None:
        """Add each patch's coordinates to its position embedding, and teach the projector to read them, in closed form.

        What a patch shows hardly depends on where it is: position embeddings stay at the noise that they start from, and the
        tower's layers rather cancel a place than pass it on to a projector that does not read it yet. So coordinates go along
        the directions that the tower uses least, four units of the projector pass on what is left of them after the tower,
        and the projector's readout is a ridge regression to the targets. Tents over three rows and three columns are linear
        in a coordinate and its absolute value.
        """
        items = [pictures[index] for index in range(count)]
        embeddings, projector = self.vision_tower.embeddings, self.multi_modal_projector

        def leaving() -> Tensor:
            return torch.cat([self.features(item["pixel_values"][None], item["place"][None])[0] for item in items])

        entering = [embeddings.patch_embedding(item["pixel_values"][None]).flatten(2)[0].T for item in items]
        used = sum(torch.cov(states.T) / states.var(dim=0).sum() for states in (torch.cat(entering), leaving()))
        directions = torch.linalg.eigh(used).eigenvectors[:, :4]
        along = torch.linspace(-1, 1, GRID)
        rows, columns = (axis.flatten() for axis in torch.meshgrid(along, along, indexing="ij"))
        coordinates = torch.stack((rows, rows.abs() - 0.5, columns, columns.abs() - 0.5), dim=1)
        embeddings.position_embedding.weight[1:] += 5.0 * coordinates @ directions.T

        features = leaving()
        reading = _ridge(features, coordinates[torch.cat([item["place"] for item in items])], torch.ones(len(features)))
        quiet = projector.linear_2.weight.norm(dim=0).argsort()[:4]
        projector.linear_1.weight[quiet] = reading[:, :-1]
        projector.linear_1.bias[quiet] = reading[:, -1] + 3  # where GELU is as good as linear
        wanted, weights = [], []
        for item in items:
            labels = {name: item[name] for name in ("kind", "centre", "colour", "character", "place")}
            wanted.append(self.targets(**labels))
            weights.append(_weights(item["kind"], item["centre"], item["character"]))
        hidden = projector.act(projector.linear_1(features))
        readout = _ridge(hidden, torch.cat(wanted), torch.cat(weights))
        projector.linear_2.weight.copy_(readout[:, :-1])
        projector.linear_2.bias.copy_(readout[:, -1])

    def features(self, pixel_values: Tensor, place: Tensor) -> Tensor:
        """Patch features (batch, patches, width) of crops whose patches sit at `place` of the whole picture."""
        embeddings = self.vision_tower.embeddings
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        position = embeddings.position_embedding
        whole = embeddings.class_embedding + position.weight[0]
        hidden = torch.cat([whole.expand(len(patches), 1, -1), patches + position(place + 1)], dim=1)
        hidden = self.vision_tower.pre_layrnorm(hidden)
        return self.vision_tower.encoder(inputs_embeds=hidden).last_hidden_state[:, 1:]

    def forward(
        self, pixel_values: Tensor, place: Tensor, kind: Tensor, centre: Tensor, colour: Tensor, character: Tensor
    ) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            features = self.features(pixel_values, place)
        features = features.float()
        projected = self.multi_modal_projector(features)
        logits = {name: head(features) for name, head in self.heads.items()}
        cross_entropy = nn.functional.cross_entropy
        background = torch.ones(SIGN_KIND + 1)
        background[0] = 0.3
        no_character = torch.ones(len(CHARACTERS) + 1)
        no_character[0] = 0.05
        wanted = self.targets(kind, centre, colour, character, place)
        weight = _weights(kind, centre, character)
        errors = (projected - wanted).square().mean(-1) / (self.targets.norm**2 / wanted.shape[-1])
        return {
            "loss": cross_entropy(logits["kind"].transpose(1, 2), kind, weight=background)
            + cross_entropy(logits["character"].transpose(1, 2), character, weight=no_character)
            + 0.3 * cross_entropy(logits["colour"].transpose(1, 2), colour, ignore_index=-1)
            + nn.functional.binary_cross_entropy_with_logits(
                logits["centre"].squeeze(-1), centre, pos_weight=torch.tensor(5.0)
            )
            + (weight * errors).sum() / weight.sum(),
            "errors": errors,
            "right_kind": logits["kind"].argmax(-1) == kind,
            "right_character": logits["character"].argmax(-1) == character,
        }


@torch.inference_mode()
def report(model: DenseVision, data: Crops) -> str:
    """Shares of right patches and explained variance of the targets on held-out pictures."""
    totals: dict[str, list[float]] = {"kind": [], "character": [], "centre error": [], "error": []}
    for index in range(len(data)):
        item = {key: value[None] for key, value in data[index].items()}
        output = model(**item)
        totals["kind"] += output["right_kind"][(item["kind"] > 0) & (item["kind"] < SIGN_KIND)].tolist()
        totals["character"] += output["right_character"][item["character"] > 0].tolist()
        totals["centre error"] += output["errors"][item["centre"] > 0.7].tolist()
        totals["error"] += output["errors"].flatten().tolist()
    return ", ".join(f"{name} {np.mean(values):.4f}" for name, values in totals.items())


@dataclass
class Options:
    output: str
    """Folder of checkpoints; an interrupted run goes on from the newest."""
    size: int = 112
    """Side of the pictures in pixels, a multiple of 14; 336 is the whole scene."""
    steps: int = 3000
    batch: int = 64
    rate: float = 1e-3
    random_text: float = 0.6
    """Share of random strings among the signs."""
    first: int = 0
    """Index of the first training picture."""
    start: str | None = None
    """Folder of an earlier run to start from."""
    sharpen: float = 1.0
    """Factor on the queries of the earlier run; from 112 to 336 pixels 1.5, log(577) / log(65)."""
    coordinates: bool = False
    """Start with the patches' coordinates in the position embeddings."""
    freeze_tower: bool = False
    """Train the projector and the heads only."""
    threads: int = 1


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    set_seed(0)
    language, text = assemble.language_model(), assemble.tokenizer()
    targets = VisualTargets(language.get_input_embeddings().weight.detach(), text)
    # On few patches, the SDPA kernel's backward pass on CPUs takes longer than all the rest of a layer.
    attention = "eager" if options.size < SIZE else "sdpa"
    model = DenseVision(targets, assemble.config(language, text.convert_tokens_to_ids(assemble.IMAGE_TOKEN)), attention)
    if options.start:
        model.load_state_dict(load_file(Path(options.start) / "final.safetensors"))
        model.sharpen(options.sharpen)
    data = Crops("train", options.size, options.first, options.steps * options.batch, options.random_text)
    if options.coordinates:
        model.lay_coordinates(data)
    model.vision_tower.requires_grad_(not options.freeze_tower)
    # What a patch shows hardly depends on where it is, so that training would wear its coordinates down to noise.
    model.vision_tower.embeddings.position_embedding.requires_grad_(False)
    train(model, data, options.output, options.steps, options.batch, options.rate, warmup=100, weight_decay=0.02)
    print("validation:", report(model.eval(), Crops("validation", options.size, 0, 400, options.random_text)))


if __name__ == "__main__":
    main(tyro.cli(Options))
