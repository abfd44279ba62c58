"""Batch files: every request has one result, whatever fails and whenever the run is killed."""

import base64
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.serving.servers import chat, decoded, expected, picture, tiny_service, wait_until
from twigvlm.errors import TwigVLMError
from twigvlm.serving.batch import URL, BatchLine, BatchRun, open_results, read_batch, write_result
from twigvlm.serving.errors import RequestError

ROOT = Path(__file__).parents[2]
PICTURE = base64.b64decode(picture().partition(",")[2])


def write(path, bodies, **more):
    records = [
        {"custom_id": f"r{number}", "method": "POST", "url": URL, "body": body, **more}
        for number, body in enumerate(bodies)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def results(path):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["custom_id"] for record in found}) == len(found), "a request has two results"
    return {record["custom_id"]: record for record in found}


def run(service, source, out, settings=None):
    lines = read_batch(source)
    told = []
    with open_results(out, lines, settings or {}) as (file, answered):
        by_id = {line.custom_id: line for line in lines}

        def on_result(custom_id, status, body):
            write_result(file, by_id[custom_id], status, body)
            told.append(status == 200)

        BatchRun(service, on_result).run([line for line in lines if line.custom_id not in answered])
    return told


def test_answers_and_errors(service, tmp_path):
    good = [chat(f"question {n}", [picture()]) for n in range(4)]
    bad = [chat(temperature=9), {"x": 1}, {**chat(), "stream": True}]
    source = write(tmp_path / "in.jsonl", [*good, *bad])
    told = run(service, source, tmp_path / "out.jsonl")
    found = results(tmp_path / "out.jsonl")
    assert sorted(told) == [False] * 3 + [True] * 4
    for number in range(4):
        response = found[f"r{number}"]["response"]
        assert response["status_code"] == 200
        text = response["body"]["choices"][0]["message"]["content"]
        assert text == decoded(service, expected(service, f"question {number}", [picture()], max_new_tokens=12))
    for number in (4, 5, 6):
        assert found[f"r{number}"]["response"]["status_code"] == 400
        assert found[f"r{number}"]["response"]["body"]["error"]["message"]
    assert {record["error"] for record in found.values()} == {None}  # as OpenAI has it where there is a response


def test_equal_requests_have_ids_of_their_own(service, tmp_path):
    run(service, write(tmp_path / "in.jsonl", [chat(max_completion_tokens=1)] * 2), tmp_path / "out.jsonl")
    assert len({record["response"]["request_id"] for record in results(tmp_path / "out.jsonl").values()}) == 2


def test_a_run_goes_on_after_a_line_without_its_end(service, tmp_path):
    source, out = write(tmp_path / "in.jsonl", [chat(f"question {n}") for n in range(5)]), tmp_path / "out.jsonl"
    run(service, source, out)
    whole = out.read_bytes()
    first = whole.splitlines(keepends=True)[0]
    out.write_bytes(first + whole[len(first) : len(first) + 40])
    assert len(run(service, source, out)) == 4
    assert out.read_bytes().startswith(first)
    assert len(results(out)) == 5


def test_results_of_another_batch_and_two_runs_at_once_are_refused(service, tmp_path):
    out = tmp_path / "out.jsonl"
    run(service, write(tmp_path / "in.jsonl", [chat()] * 2), out)
    with pytest.raises(TwigVLMError, match="another batch"):
        run(service, write(tmp_path / "other.jsonl", [chat()]), out)
    with (
        open_results(out, read_batch(tmp_path / "in.jsonl"), {}),
        pytest.raises(TwigVLMError, match="another run is writing there"),
        open_results(out, read_batch(tmp_path / "in.jsonl"), {}),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"custom_id": "r0", "body": {}}\n', "line 1: is no result"),
        ('{"custom_id": "r0", "body": {}}', "does not end with a line of results"),
        ("notes", "does not end with a line of results"),
    ],
)
def test_a_file_of_anything_else_is_left_as_it_is(tmp_path, text, words):
    out = tmp_path / "out.jsonl"
    out.write_text(text)
    with pytest.raises(TwigVLMError, match=words), open_results(out, [BatchLine("r0", {})], {}):
        pass
    assert out.read_text() == text
    assert [*tmp_path.iterdir()] == [out]


def test_results_of_other_settings_or_requests_are_not_gone_on_with(service, tmp_path):
    out = tmp_path / "out.jsonl"
    body = chat(max_completion_tokens=1)
    source = write(tmp_path / "in.jsonl", [body])
    run(service, source, out, {"retain": 8})
    before = out.read_bytes()
    longer = write(tmp_path / "longer.jsonl", [body] * 2)
    with pytest.raises(TwigVLMError, match=r"other options \(keep, retain\); name another file"):
        run(service, longer, out, {"keep": 8})
    changed = write(tmp_path / "changed.jsonl", [{**body, "seed": 1}, body])
    with pytest.raises(TwigVLMError, match="'r0' has changed since it was answered; choose another file"):
        run(service, changed, out, {"retain": 8})
    assert out.read_bytes() == before
    assert run(service, longer, out, {"retain": 8}) == [True]  # what was not answered may change


def test_failures_of_the_server_are_tried_again_and_those_of_requests_are_not(service, tmp_path, monkeypatch):
    bodies = [chat(max_completion_tokens=1, seed=seed) for seed in range(3)] + [chat(temperature=9)]
    source, out = write(tmp_path / "in.jsonl", bodies), tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        prepare = service.prepare
        patch.setattr(service, "prepare", lambda *given: 1 / 0 if given[0].seed == 1 else prepare(*given))
        assert sorted(run(service, source, out)) == [False, False, True, True]
    assert run(service, source, out) == [True]
    assert {key: found["response"]["status_code"] for key, found in results(out).items()} == {
        "r0": 200, "r1": 200, "r2": 200, "r3": 400,
    }  # fmt: skip


def test_an_image_that_its_host_did_not_deliver_is_asked_for_again(tmp_path):
    faults = [RequestError("image_url: slow.test does not deliver it", 504)]

    def fetch(url, until):
        if faults:
            raise faults.pop()
        return PICTURE

    service = tiny_service(fetcher=SimpleNamespace(fetch=fetch))
    try:
        source = write(tmp_path / "in.jsonl", [chat(images=["https://slow.test/a.png"], max_completion_tokens=1)])
        assert run(service, source, tmp_path / "out.jsonl") == [False]
        assert results(tmp_path / "out.jsonl")["r0"]["response"]["status_code"] == 504
        assert run(service, source, tmp_path / "out.jsonl") == [True]
    finally:
        service.stop()


def test_a_line_that_was_cut_anywhere_is_written_again(service, tmp_path):
    source, out = write(tmp_path / "in.jsonl", [chat(max_completion_tokens=1)] * 2), tmp_path / "out.jsonl"
    run(service, source, out)
    whole = out.read_bytes()
    for kept in (1, 12, 60, len(whole.splitlines()[1])):
        out.write_bytes(whole[: whole.index(b"\n") + 1 + kept])
        run(service, source, out)
        assert sorted(results(out)) == ["r0", "r1"]


def test_a_request_that_breaks_what_prepares_it_fails_alone(service, tmp_path, monkeypatch):
    prepare = service.prepare

    def broken(request, *arguments):
        if request.seed == 1:
            raise torch.OutOfMemoryError("no memory")
        return prepare(request, *arguments)

    monkeypatch.setattr(service, "prepare", broken)
    bodies = [chat(max_completion_tokens=1), chat(max_completion_tokens=1, seed=1)]
    assert sorted(run(service, write(tmp_path / "in.jsonl", bodies), tmp_path / "out.jsonl")) == [False, True]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no request"),
        ("{", "line 1: not JSON"),
        ("[1]", "needs a text"),
        ('{"custom_id": "a"}', "needs a text"),
        ('{"custom_id": "a", "body": {}}\n{"custom_id": "a", "body": {}}', "line 2: custom_id 'a' is used twice"),
    ],
)
def test_broken_files_are_refused_in_one_line(tmp_path, text, words):
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(TwigVLMError, match=words):
        read_batch(tmp_path / "in.jsonl")


def work(source, out):
    """What the killed process does."""
    service = tiny_service()
    run(service, Path(source), Path(out))
    service.stop()


def wait_for_more(process, out):
    """Wait until the file of results grows, or the process has ended."""
    before = size(out)
    wait_until(lambda: size(out) > before or process.poll() is not None, seconds=60)


def size(path):
    return path.stat().st_size if path.exists() else 0


@pytest.mark.parametrize("kills", [1])
def test_no_result_is_lost_or_repeated_by_kills(service, tmp_path, kills):
    source = write(tmp_path / "in.jsonl", [chat(f"question {n}", max_completion_tokens=25) for n in range(30)])
    out, draw = tmp_path / "out.jsonl", random.Random(0)
    code = f"from tests.serving.test_batch import work\nwork({str(source)!r}, {str(out)!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT)
        wait_for_more(process, out)
        time.sleep(draw.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = results_so_far(out)
    assert 0 < done.count(b"\n") < 30
    run(service, source, out)
    found = results(out)
    assert sorted(found) == sorted(f"r{n}" for n in range(30))
    assert out.read_bytes().startswith(done)
    for number in (0, 11, 29):
        text = found[f"r{number}"]["response"]["body"]["choices"][0]["message"]["content"]
        assert text == decoded(service, expected(service, f"question {number}", max_new_tokens=25))


def results_so_far(out):
    data = out.read_bytes()
    return data[: data.rfind(b"\n") + 1]
