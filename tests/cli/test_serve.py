"""The commands `serve` and `batch`, as their users start them."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from twigvlm.cli.serve_vllm import vllm_command

pytest.importorskip("uvicorn")

SOURCE = Path(__file__).parents[2] / "src"


def test_serve_answers_until_sigterm(base_directory, twig_directory):
    command = [sys.executable, "-m", "twigvlm", "serve", "--model", base_directory, "--twig", twig_directory]
    command += ["--port", "0", "--name", "tiny", "--speculate", "chain", "--retain", "8"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "TWIGVLM_API_KEY": "secret"}
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
        assert (out, err) == ("", "")
        assert process.returncode == -signal.SIGTERM  # it ends as what sent the signal expects, after its shutdown
    finally:
        process.kill()


def test_batch_writes_results_and_goes_on(base_directory, twig_directory, tmp_path, capsys):
    from twigvlm.cli.main import main

    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    source.write_text("".join(json.dumps({"custom_id": f"{n}", "body": body}) + "\n" for n in range(3)))
    options = ["--model", str(base_directory), "--twig", str(twig_directory), "--name", "tiny"]
    assert main(["batch", str(source), str(out), *options]) == 0
    assert len(out.read_text().splitlines()) == 3
    assert main(["batch", str(source), str(out), *options]) == 0
    assert "All 3 requests have their results" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "70000"], "port=70000"),
        (["--max-rows", "0"], "max_rows=0"),
        (["--export", "x"], "applies only to --engine vllm"),
        (["--engine", "vllm"], "needs --export"),
        (["--engine", "vllm", "--export", "x", "--retain", "64"], "leave out either"),
    ],
)
def test_options_that_do_not_fit_are_refused(refused, options, words):
    refused("serve", *options, words=[words])


def test_a_twig_that_is_asked_for_must_be_there(refused, base_directory):
    refused("serve", "--model", base_directory, "--retain", "8", words=["needs a twig"])


def test_the_command_line_of_vllm_is_found_in_what_export_prints():
    printed = 'Drafter: d\n\nServe:\nA=0 vllm serve base --speculative-config \'{"model": "d e"}\'\n\nIn Python:\nllm\n'
    environment, arguments = vllm_command(printed, Path("note"))
    assert environment == {"A": "0"}
    assert arguments == ["serve", "base", "--speculative-config", '{"model": "d e"}']
