from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO

import pytest
import torch
from PIL import Image

from tests.tiny import tiny_llava
from tests.tiny_processor import tiny_processor
from twigvlm.cli.main import main
from twigvlm.cli.session import build_inputs
from twigvlm.config import TwigConfig
from twigvlm.evaluation import figures
from twigvlm.model import TwigVLM


@pytest.fixture
def arguments(picture, base_directory, twig_directory, tmp_path):
    basic = {"image": picture, "prompt": "Is it <b>?", "model": base_directory, "twig": twig_directory, "retain": 8}

    def build(*budgets, **changes):
        options = {**basic, "device": "cpu", "max-new-tokens": 12, "out": tmp_path / "out", **changes}
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        return ["inspect", *words, "--budgets", *map(str, budgets or (10, 8))]

    return build


class Page(HTMLParser):
    """What a browser would be told to load, and the text of the elements that have a class or are cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.spans, self.cells, self.inside = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        self.inside.append(tag)
        if tag == "span":
            self.spans.append([attributes["class"], attributes.get("title"), ""])
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if self.inside and self.inside[-1] == "span":
            self.spans[-1][2] += data
        if self.inside and self.inside[-1] in ("th", "td"):
            self.cells[-1] += data


def test_picture_and_page(capsys, arguments, picture, base_directory, twig_directory, tmp_path):
    out = tmp_path / "new" / "out"
    assert main(arguments(out=out)) == 0
    assert capsys.readouterr().out == f"Patches: {out / 'patches.png'}\nAnswer: {out / 'answer.html'}\n"
    assert sorted(path.name for path in out.iterdir()) == ["answer.html", "patches.png"]
    text = (out / "answer.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    (source,) = page.sources
    assert source.startswith("data:image/png;base64,")
    assert b64decode(source.partition(",")[2]) == (out / "patches.png").read_bytes()
    with Image.open(out / "patches.png") as shown:
        assert shown.width > shown.height  # four panels beside each other, and two below
    assert "Is it &lt;b&gt;?" in text
    assert "<b>" not in text
    assert "prefers-color-scheme: dark" in text

    model = TwigVLM.from_pretrained(tiny_llava(), twig_directory)
    with Image.open(picture) as shown:
        inputs = build_inputs(model.model, tiny_processor(), [shown.convert("RGB")], ["Is it <b>?"])
    output = model.generate(
        **inputs, max_new_tokens=12, retain=8, speculate="chain", return_dict_in_generate=True, do_sample=False
    )
    answer = output.sequences[0, inputs["input_ids"].shape[1] :]
    tokens = [span for span in page.spans if span[1] is not None]
    assert "".join(span[2] for span in tokens) == tiny_processor().tokenizer.decode(answer)
    assert [span[0] for span in tokens].count("draft") == sum(output.accepted_lengths[0])
    first = "draft" if output.accepted_lengths[0][0] else "base"
    assert tokens[0][0] == first
    assert tokens[0][1].startswith("prefill: ")
    assert tokens[-1][1].startswith(f"step {len(output.accepted_lengths[0]) - 1}: ")
    assert [span[0] for span in page.spans if span[1] is None] == ["draft", "base"]  # the legend
    cells = dict(zip(page.cells[::2], page.cells[1::2], strict=True))
    assert cells["tokens"] == "12"
    assert cells["drafted tokens"] == str(sum(output.drafted_lengths[0]))
    assert cells["accepted tokens"] == str(sum(output.accepted_lengths[0]))
    assert cells["visual tokens kept"] == "5 of 16"


def test_maps_and_kept_patches_are_those_of_generation(arguments, base_directory, twig_directory, picture, monkeypatch):
    drawn = {}

    def draw(image, maps, kept, box):
        drawn.update(maps=maps, kept=kept)
        return b"picture"

    monkeypatch.setattr("twigvlm.evaluation.figures.draw_patches", draw)
    assert main(arguments(10, 8)) == 0
    assert list(drawn["maps"]) == [
        "attention of the last twig layer", "attention of base layer 2 (K)", "attention of base layer 4 of 6",
    ]  # fmt: skip
    assert all(scores.shape == (4, 4) for scores in drawn["maps"].values())
    deep = drawn["maps"]["attention of base layer 4 of 6"]
    assert main(arguments(10, 8, **{"deep-layer": 6})) == 0
    assert list(drawn["maps"])[2] == "attention of base layer 6 of 6"
    model = TwigVLM.from_pretrained(tiny_llava(), twig_directory)
    with Image.open(picture) as shown:
        inputs = build_inputs(model.model, tiny_processor(), [shown.convert("RGB")], ["Is it <b>?"])
    first = int(model.base.visual_mask(inputs["input_ids"]).int().argmax())
    row = tiny_llava(attention="eager")(**inputs, output_attentions=True).attentions[3][0, :, -1].mean(dim=0)
    torch.testing.assert_close(torch.as_tensor(deep).flatten(), row[first : first + 16], rtol=1e-3, atol=1e-5)
    for budget, indices in zip((10, 8), drawn["kept"].values(), strict=True):
        output = model.generate(**inputs, max_new_tokens=1, retain=budget, return_dict_in_generate=True)
        assert (output.kept_indices[0] - first).tolist() == indices


@pytest.mark.parametrize("pruning_head", [False, True])
def test_maps_are_of_the_rankings_that_there_are(arguments, tmp_path, monkeypatch, pruning_head):
    """A twig on the embeddings has no trunk layer to show; one with a P-Head has a ranking more."""
    config = TwigConfig(trunk_layers=0, twig_layers=1, pruning_head=pruning_head)
    TwigVLM.grow(tiny_llava(), config).save_pretrained(tmp_path / "twig")
    titles = []
    monkeypatch.setattr("twigvlm.evaluation.figures.draw_patches", lambda i, maps, k, b: titles.extend(maps) or b"")
    assert main(arguments(twig=tmp_path / "twig")) == 0
    head = ["P-Head"] if pruning_head else []
    assert titles == [*head, "attention of the last twig layer", "attention of base layer 4 of 6"]


def test_bad_input_writes_nothing(refused, arguments, picture, tmp_path):
    refused(*arguments(image=tmp_path / "none.png"), words=["none.png", "no such file"])
    refused(*arguments(prompt=" "), words=["prompt", "is empty"])
    refused(*arguments(out=picture), words=["picture.png", "is a file"])
    refused(*arguments(out=picture / "below"), words=["is not a writable directory"])
    refused(*arguments(retain="None", speculate="none"), words=["nothing to do"])
    refused(*arguments(100), words=["retain=100"])
    refused(*arguments(**{"deep-layer": 7}), words=["deep_layer=7", "1 to 6"])
    refused(*arguments()[:-2], words=["budgets: none given"])
    refused("inspect", "--retain", "None", "--speculate", "none", words=["no twig to inspect"])
    assert not (tmp_path / "out").exists()


def test_matplotlib_is_asked_for_before_anything_is_loaded(refused, arguments, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    refused(*arguments(model="none"), words=["needs matplotlib", "twigvlm[report]"])


def test_panels_show_what_they_are_given():
    image = Image.new("RGB", (80, 40), "white")
    maps = {"low": torch.zeros(4, 4), "high": torch.eye(4)}
    shown = figures.draw_patches(image, maps, {"few": [0], "all": range(16)}, (20, 0, 60, 40))
    with Image.open(BytesIO(shown)) as sheet:
        pixels = sheet.convert("RGB")
    assert pixels.getpixel((0, 0)) == (255, 255, 255)
    assert pixels.getextrema() != ((255, 255),) * 3
    assert shown != figures.draw_patches(image, maps, {"few": [1], "all": range(16)}, (20, 0, 60, 40))
    assert shown != figures.draw_patches(image, {**maps, "high": torch.eye(4).flip(0)}, {"few": [0], "all": range(16)})
