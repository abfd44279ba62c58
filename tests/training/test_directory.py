"""Where a training writes: one run at a time, on a disk with room, with the modes of other files."""

import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from tests.tiny import tiny_llava
from tests.training.runs import grow, make_dataset, stage1, stage2
from tests.training.stop import StopAt
from twigvlm.base.vlm import BaseVLM
from twigvlm.errors import TwigVLMError
from twigvlm.files import LOCK, replacing, reserved
from twigvlm.training.options import ProjectorConfig
from twigvlm.training.projector import TunedProjector, train_projector


@contextmanager
def full_disk(size):
    """No file may become larger than `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class FillDisk(TrainerCallback):
    def __init__(self, step, size):
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("size", [60_000, 150_000], ids=["weights", "optimiser"])
@pytest.mark.parametrize(("step", "newest"), [(1, "start again"), (2, "resume from checkpoint-1")])
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, size, step, newest):
    options = {"max_steps": 3, "save_steps": 1}
    whole = grow()
    stage1(whole, tmp_path / "whole", **options)
    run = tmp_path / "run"
    message = f"checkpoint-{step}: cannot be written .*free space there, then {newest}$"
    with full_disk(2**20), pytest.raises(TwigVLMError, match=message) as caught:
        stage1(grow(), run, callbacks=[FillDisk(step, size)], **options)
    assert "\n" not in str(caught.value)
    assert {path.name for path in run.iterdir()} == {"settings.json", *(["checkpoint-1"] if step == 2 else [])}
    resumed = grow()
    stage1(resumed, run, resume=True, **options)
    expected = whole.twig.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.twig.state_dict().items())


def test_a_disk_without_room_for_the_checkpoints_is_refused_at_once(tmp_path, monkeypatch):
    model = grow()
    checkpoint = 12 * sum(parameter.numel() for parameter in model.twig.parameters())
    free = SimpleNamespace(free=2 * checkpoint - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(TwigVLMError, match="GB are free, and the checkpoints need"):
        stage1(model, tmp_path, max_steps=2, save_steps=1)
    assert not list(tmp_path.glob("checkpoint-*"))
    stage1(model, tmp_path, resume=True, max_steps=2, save_steps=5)


@pytest.mark.parametrize("damage", ["cut off", "missing"])
def test_a_checkpoint_that_was_copied_in_part_is_refused(tmp_path, damage):
    """Above all, without its optimiser's state it would go on as if nothing had happened, to another twig."""
    options = {"max_steps": 3, "save_steps": 1, "accumulate": 1}
    stage1(grow(), tmp_path / "run", callbacks=[StopAt(2)], **options)
    names = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    for name in names - ({"trainer_state.json"} if damage == "missing" else set()):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        file = tmp_path / name / "checkpoint-2" / name
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(TwigVLMError, match=f"checkpoint-2/{name}: is missing or was cut off; copy .* one before$"):
            stage1(grow(), tmp_path / name, resume=True, **options)
    shutil.rmtree(file.parent)
    for folder in (tmp_path / "run", tmp_path / name):
        stage1(grow(), folder, resume=True, **options)
    whole, resumed = (
        (folder / "checkpoint-3" / "model.safetensors").read_bytes() for folder in (tmp_path / "run", tmp_path / name)
    )
    assert whole == resumed


def test_copies_of_checkpoints_under_other_names_are_left_alone(tmp_path):
    options = {"max_steps": 4, "save_steps": 1, "accumulate": 1}
    stage1(grow(), tmp_path, callbacks=[StopAt(1)], **options)
    for name in ("checkpoint-best", "checkpoint-1-mine"):
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / name)
    stage1(grow(), tmp_path, resume=True, **options)
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {"checkpoint-3", "checkpoint-4", "checkpoint-best", "checkpoint-1-mine"}


def test_an_old_checkpoint_whose_removal_was_cut_off_leaves_nothing(tmp_path, monkeypatch):
    options = {"max_steps": 4, "save_steps": 1, "accumulate": 1}
    remove = shutil.rmtree

    def cut_off(path, *args, **kwargs):
        if Path(path).exists():
            (Path(path) / "trainer_state.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        stage1(grow(), tmp_path, **options)
    monkeypatch.setattr(shutil, "rmtree", remove)
    stage1(grow(), tmp_path, resume=True, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-4", "settings.json"}


@pytest.mark.parametrize("content", ['{"alpha":', "[]", "[" * 100_000], ids=["cut off", "a list", "deep"])
def test_settings_that_cannot_be_read_are_one_line(tmp_path, content):
    stage1(grow(), tmp_path, max_steps=1)
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(TwigVLMError, match=r"settings.json: cannot be read \(.*\); copy it again, or start") as caught:
        stage1(grow(), tmp_path, resume=True, max_steps=1)
    assert "\n" not in str(caught.value)


def test_what_a_process_cannot_write_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/self/run")):
        with pytest.raises(TwigVLMError, match=r"directory .*(is a file|cannot be written)"):
            stage1(grow(), path, max_steps=1)
    with full_disk(1000), pytest.raises(TwigVLMError, match=r"cannot be written .*free space there"):
        stage1(grow(), tmp_path / "run", max_steps=1)
    assert os.listdir(tmp_path) == ["file"]


def test_one_run_at_a_time(tmp_path):
    with (
        reserved(tmp_path, "directory"),
        pytest.raises(TwigVLMError, match=r"directory .*: another run is writing there; wait until it ends"),
    ):
        stage1(grow(), tmp_path, max_steps=1)
    (tmp_path / LOCK).touch()  # a run that was killed leaves its file
    stage1(grow(), tmp_path, max_steps=1)
    assert not (tmp_path / LOCK).exists()


def test_another_kind_of_training_does_not_go_on_there(tmp_path):
    def projector(directory, resume=False):
        settings = ProjectorConfig(retain=6, batch_size=1, max_steps=1)
        train_projector(TunedProjector(BaseVLM(tiny_llava())), make_dataset(), settings, directory, resume)

    stage2(grow(), tmp_path / "stage2", max_steps=1)
    with pytest.raises(
        TwigVLMError, match=r"training=projector: the checkpoint in .* was trained with stage2; .*other"
    ):
        projector(tmp_path / "stage2", resume=True)
    projector(tmp_path / "projector")
    with pytest.raises(TwigVLMError, match=r"training=stage1: the checkpoint in .* was trained with projector"):
        stage1(grow(), tmp_path / "projector", resume=True, max_steps=1)


def test_a_folder_made_for_nothing_is_removed(tmp_path):
    with reserved(tmp_path / "run", "out"):
        assert (tmp_path / "run" / LOCK).exists()
    assert not (tmp_path / "run").exists()
    with reserved(tmp_path / "run", "out"):
        (tmp_path / "run" / "result").touch()
    assert os.listdir(tmp_path / "run") == ["result"]


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_have_the_mode_of_any_new_file(tmp_path, mask):
    model = grow()
    with umask(mask):
        stage1(model, tmp_path / "run", max_steps=1)
        model.save_pretrained(tmp_path / "twig")
    files = [file for file in tmp_path.glob("**/*") if file.is_file()]
    assert {file.name for file in files} >= {"model.safetensors", "optimizer.pt", "twig_model.safetensors", "README.md"}
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {oct(0o666 & ~mask)}


def test_a_file_that_cannot_be_replaced_stays(tmp_path):
    (tmp_path / "page.md").write_text("before")
    message = r"page.md: cannot be written .*File too large.*free space"
    with full_disk(3), pytest.raises(TwigVLMError, match=message), replacing(tmp_path / "page.md") as temporary:
        temporary.write_text("after that")
    assert (tmp_path / "page.md").read_text() == "before"
    assert os.listdir(tmp_path) == ["page.md"]
