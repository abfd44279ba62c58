"""`vllm serve` with an exported twig, as the command line prints it, behind the OpenAI client."""

import base64
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.vllm.conftest import ROOT
from twigvlm import TwigVLM, sapling


@contextlib.contextmanager
def served(command, folder):
    """A server that the command line starts, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "tests" / "vllm" / "site"),
        "PATH": f"{Path(os.sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }
    options = ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *options], env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        end = time.monotonic() + 900
        while time.monotonic() < end:
            assert process.poll() is None, (folder / "log").read_text()[-5000:]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def expected_answer(picture, question, scouting):
    """What this library answers with the same weights."""
    base, processor = sapling.load(dtype=torch.float32)
    model = TwigVLM.from_pretrained(base, sapling.twig_path())
    options = {"retain": 64, "scout": True} if scouting else {}
    return model.chat(processor, max_new_tokens=12, **options).ask(question, images=[picture])


@pytest.mark.parametrize("scouting", [False, True], ids=["whole", "scouting"])
def test_the_openai_client_gets_answers(capsys, pictures, tmp_path, scouting):
    from openai import BadRequestError, OpenAI

    from twigvlm.cli.main import main
    from twigvlm.sapling.assemble import IMAGE_TOKEN

    arguments = ["export", "vllm", str(tmp_path / "drafter"), "--base", str(tmp_path / "base"), "--dtype", "float32"]
    assert main([*arguments, *(["--scout-retain", "64"] if scouting else [])]) == 0
    printed = capsys.readouterr().out.splitlines()
    command = shlex.split(next(line for line in printed if "vllm serve" in line))
    command = command[command.index("vllm") :]  # the tests choose the runner themselves
    assert command[2] == str(tmp_path / "base")
    command += ["--trust-request-mm-kwargs"] if scouting else []
    url = "data:image/png;base64," + base64.b64encode(Path(pictures[0]).read_bytes()).decode()
    text = "What is in the top left?"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    more = {"extra_body": {"mm_processor_kwargs": {"question": text}}} if scouting else {}
    with served(command, tmp_path) as address:
        client = OpenAI(base_url=address, api_key="none")
        chat = [{"role": "user", "content": content}]
        if scouting:  # and the server goes on
            wrong = {"mm_processor_kwargs": {"question": f"What is in {IMAGE_TOKEN}?"}}
            with pytest.raises(BadRequestError, match="must be text"):
                client.chat.completions.create(model=command[2], messages=chat, max_tokens=2, extra_body=wrong)
        answer = client.chat.completions.create(model=command[2], messages=chat, max_tokens=12, temperature=0.0, **more)
        assert answer.choices[0].message.content.strip() == expected_answer(pictures[0], text, scouting)
        assert (answer.usage.prompt_tokens < 100) == scouting
        pieces = client.chat.completions.create(
            model=command[2], messages=chat, max_tokens=12, temperature=0.0, stream=True, **more
        )
        streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert streamed == answer.choices[0].message.content
