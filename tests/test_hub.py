"""Twigs that come from the hub and go there, with a model card and the record of their training; nobody is asked for real."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.tiny import tiny_llava
from twigvlm import TwigConfig, TwigVLM, TwigVLMError
from twigvlm.checkpoints import twig_files
from twigvlm.checkpoints.card import MARK
from twigvlm.checkpoints.hub import is_hub_id

RECORD = [{"stage": "stage1", "samples": 7, "steps": 3, "final": {"loss": 1.25}, "settings": {"alpha": 0.1}}]
ANSWER = SimpleNamespace(headers={}, request=None)  # the hub's errors quote it


@pytest.fixture
def grown():
    model = TwigVLM.grow(tiny_llava(), TwigConfig(2, 2, pruning_head=True))
    model.twig.record = [dict(entry) for entry in RECORD]
    return model


def test_names():
    assert is_hub_id("user/my-twig_1.0")
    for name in ("my-twig", "./my-twig", "../my-twig", "/some/where", "a/b/c", "src/twigvlm", ""):
        assert not is_hub_id(name)


def test_a_hub_id_is_downloaded(grown, tmp_path, monkeypatch):
    asked = []
    grown.save_pretrained(tmp_path / "cache")

    def download(name, **options):
        asked.append((name, options))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = TwigVLM.from_pretrained(tiny_llava(), "user/twig", revision="v1", token="secret")
    assert torch.equal(loaded.twig.head.weight, grown.twig.head.weight)
    assert loaded.twig.record == RECORD
    files = [twig_files.WEIGHTS, twig_files.CONFIG, twig_files.RECORD]
    assert asked == [("user/twig", {"revision": "v1", "token": "secret", "allow_patterns": files})]


def test_a_directory_needs_no_hub(grown, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    grown.save_pretrained("runs/twig")
    TwigVLM.from_pretrained(tiny_llava(), "runs/twig")
    with pytest.raises(TwigVLMError, match="revision='v1': runs/twig is not a hub id"):
        TwigVLM.from_pretrained(tiny_llava(), "runs/twig", revision="v1")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("gated", response=ANSWER), "access is restricted; ask for it"),
        (RepositoryNotFoundError("404", response=ANSWER), "no such directory, and no such repository"),
        (RevisionNotFoundError("404", response=ANSWER), "has no revision='v1'"),
        (HfHubHTTPError("500\nServer Error", response=ANSWER), r"cannot be downloaded \(500 Server Error\)"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, error, message):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(TwigVLMError, match=f"user/twig: {message}") as caught:
        TwigVLM.from_pretrained(tiny_llava(), "user/twig", revision="v1")
    assert "\n" not in str(caught.value)


def test_offline():
    """The library's own answer without a network: tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(
        TwigVLMError, match=r"nobody/nothing-of-this-name: .*not in the cache.*cannot be reached; go online"
    ):
        TwigVLM.from_pretrained(tiny_llava(), "nobody/nothing-of-this-name")


def unreachable(*_, **__):
    raise HfHubHTTPError.__bases__[0]("[Errno 111]\nConnection refused")  # the HTTP client's own


def test_a_hub_that_cannot_be_reached(grown, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "create_repo", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    for ask in (grown.push_to_hub, lambda name: TwigVLM.from_pretrained(tiny_llava(), name)):
        with pytest.raises(TwigVLMError, match=r"user/twig: .*; go online") as caught:
            ask("user/twig")
        assert "\n" not in str(caught.value)
        assert "log in" not in str(caught.value)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose repository is a directory."""

    def create(name, **options):
        assert options == {"private": True, "token": "secret", "exist_ok": True}
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}", endpoint="https://huggingface.co")

    def upload(*, repo_id, folder_path, commit_message, token, ignore_patterns, delete_patterns):
        assert (repo_id, commit_message, token) == ("user/twig", "First", "secret")
        for name in delete_patterns:
            (tmp_path / "hub" / name).unlink(missing_ok=True)
        shutil.copytree(
            folder_path, tmp_path / "hub", dirs_exist_ok=True, ignore=shutil.ignore_patterns(*ignore_patterns)
        )

    def download(name, file, token):
        if not (tmp_path / "hub" / file).exists():
            raise RemoteEntryNotFoundError("404", response=ANSWER)
        return str(tmp_path / "hub" / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "create_repo", create)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    return tmp_path / "hub"


def test_push(grown, hub):
    grown.model.config._name_or_path = grown.model.name_or_path = "someone/llava"
    page = grown.push_to_hub("user/twig", private=True, token="secret", commit_message="First")
    assert page == "https://huggingface.co/user/twig"
    names = {twig_files.WEIGHTS, twig_files.CONFIG, twig_files.RECORD, twig_files.CARD}
    assert {file.name for file in hub.iterdir()} == names
    assert json.loads((hub / twig_files.CONFIG).read_text())["base"]["name"] == "someone/llava"
    card = (hub / twig_files.CARD).read_text()
    front = card.split("---\n")[1]
    assert "base_model: someone/llava\n" in front
    assert "library_name: twigvlm\n" in front
    assert 'TwigVLM.from_pretrained(base, "user/twig")' in card
    assert "| twig_layers | 2 |" in card
    assert "3 steps, on 7 samples" in card
    assert "| loss | 1.25 |" in card
    assert "| alpha | 0.1 |" in card
    TwigVLM.from_pretrained(tiny_llava(), hub)


def test_a_push_keeps_a_card_that_someone_wrote_and_no_record_of_another_twig(grown, hub):
    def push():
        grown.push_to_hub("user/twig", private=True, token="secret", commit_message="First")

    push()
    (hub / twig_files.CARD).write_text("Mine.")
    grown.twig.record = []
    push()
    assert (hub / twig_files.CARD).read_text() == "Mine."
    assert not (hub / twig_files.RECORD).exists()


def test_a_push_that_is_refused(grown, monkeypatch):
    def refuse(*_, **__):
        raise LocalTokenNotFoundError("Token is required\nbut no token found.")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    with pytest.raises(TwigVLMError, match=r"user/twig: not pushed \(Token .*'hf auth login'") as caught:
        grown.push_to_hub("user/twig")
    assert "\n" not in str(caught.value)


def test_the_card_follows_the_twig_until_someone_edits_it(grown, tmp_path):
    card, record = tmp_path / twig_files.CARD, tmp_path / twig_files.RECORD
    grown.save_pretrained(tmp_path)
    assert "base_model:" not in card.read_text()
    assert json.loads(record.read_text()) == RECORD
    grown.twig.record = []
    grown.save_pretrained(tmp_path)
    assert "No record of a training" in card.read_text()
    assert not record.exists()
    mine = card.read_text().replace(MARK, "").replace("No record", "My own words")
    card.write_text(mine)
    grown.save_pretrained(tmp_path)
    assert card.read_text() == mine


def test_a_base_in_a_directory_has_no_name_elsewhere(grown, tmp_path):
    grown.model.save_pretrained(tmp_path / "base")
    base = type(grown.model).from_pretrained(tmp_path / "base")
    TwigVLM.grow(base, TwigConfig(2, 2)).save_pretrained(tmp_path / "twig")
    assert json.loads((tmp_path / "twig" / twig_files.CONFIG).read_text())["base"]["name"] is None
    assert str(tmp_path) not in (tmp_path / "twig" / twig_files.CARD).read_text()


def test_a_broken_record(grown, tmp_path):
    grown.save_pretrained(tmp_path)
    for text, message in (
        ("[{", "cannot be read"),
        ("{}", "not the record of a twig's trainings"),
        ("[1]", "not the record"),
        ('[{"stage": "stage1"}]', "not the record"),
        (json.dumps([{**RECORD[0], "final": 1}]), "not the record"),
        ("[" * 100_000, "cannot be read"),
    ):
        (tmp_path / twig_files.RECORD).write_text(text)
        with pytest.raises(TwigVLMError, match=rf"training\.json: {message}"):
            TwigVLM.from_pretrained(tiny_llava(), tmp_path)
