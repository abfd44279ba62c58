"""Ray Data and Ray Serve on a local Ray with two workers: `make test-ray`."""

import base64
import json
import os
import signal
import threading
from pathlib import Path

import pytest

pytest.importorskip("ray")

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "src" / "twigvlm" / "sapling" / "demo.png"
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import psutil  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import ray  # noqa: E402
from PIL import Image  # noqa: E402
from ray import serve  # noqa: E402

from tests.serving.servers import chat, decoded, expected, picture, slow_down, tiny_service, wait_until  # noqa: E402
from tests.tiny import tiny_llava  # noqa: E402
from tests.tiny_processor import tiny_processor  # noqa: E402
from twigvlm.errors import TwigVLMError  # noqa: E402
from twigvlm.integrations.ray import OpenModel, answer_dataset, read_answers, serve_app  # noqa: E402
from twigvlm.serving.batch import BatchLine, BatchRun  # noqa: E402
from twigvlm.serving.limits import Limits  # noqa: E402


def make_service(limits):
    return tiny_service(limits=limits)


def make_slow_service(limits):
    service = tiny_service(limits=limits)
    slow_down(service, 0.02)
    return service


def make_dying_service(limits):
    service = tiny_service(limits=limits)
    service.prepare = lambda *arguments: os._exit(1)
    return service


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def service():
    found = tiny_service()
    yield found
    found.stop()


SAPLING = OpenModel("sapling", dtype="float32", device="cpu")
SIGNS = {"retain": 64, "speculate": "chain"}


@pytest.fixture(scope="module")
def sapling():
    found = SAPLING(Limits())
    yield found
    found.stop()


@pytest.fixture
def client():
    """Of the application that a test runs."""
    from openai import OpenAI

    serve.start(http_options={"host": "127.0.0.1", "port": 8765})
    try:
        with OpenAI(base_url="http://127.0.0.1:8765/v1", api_key="unused", max_retries=0) as found:
            yield found
    finally:
        serve.shutdown()


def records(count):
    ids = [f"r{number:03d}" for number in range(count)]
    return pa.table({"id": ids, "question": [f"question {key}" for key in ids], "image": [picture()] * count})


def check(service, out, count):
    answers = read_answers(out).to_pylist()
    assert [answer["id"] for answer in answers] == [f"r{number:03d}" for number in range(count)]
    assert not [answer for answer in answers if answer["error"]]
    for answer in answers[:: max(1, count // 4)]:
        ids = expected(service, f"question {answer['id']}", [picture()], max_new_tokens=8)
        assert answer["answer"] == decoded(service, ids)
        assert answer["tokens"] == len(ids)


def test_parquet_in_parquet_out_and_again(service, tmp_path):
    pq.write_table(records(24), tmp_path / "in.parquet")
    options = {"workers": 2, "batch_size": 4, "max_completion_tokens": 8, "speculate": "chain"}
    assert answer_dataset(tmp_path / "in.parquet", tmp_path / "out", make_service, **options) == 24
    check(service, tmp_path / "out", 24)
    files = sorted((tmp_path / "out").glob("*.parquet"))
    assert len(files) >= 2
    lost = pq.read_table(files[0]).num_rows
    files[0].unlink()
    assert answer_dataset(tmp_path / "in.parquet", tmp_path / "out", make_service, **options) == lost
    check(service, tmp_path / "out", 24)
    assert answer_dataset(tmp_path / "in.parquet", tmp_path / "out", make_service, **options) == 0


def test_a_folder_of_pictures_and_what_cannot_be_answered(tmp_path):
    Image.new("RGB", (20, 12), "red").save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_text("no picture")
    lines = [
        {"question": "what?", "image": "a.png"},
        {"question": "what?", "image": "broken.png"},
        {"question": "text"},
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert answer_dataset(tmp_path, tmp_path / "out", make_service, max_completion_tokens=4, keep=5) == 3
    found = read_answers(tmp_path / "out").to_pylist()
    assert [bool(answer["error"]) for answer in found] == [False, True, False]
    assert "broken.png" in found[1]["error"]
    assert 0 < found[0]["visual_tokens"] < 16
    Image.new("RGB", (20, 12), "red").save(tmp_path / "broken.png")
    assert answer_dataset(tmp_path, tmp_path / "out", make_service, max_completion_tokens=4, keep=5) == 1
    assert not [answer for answer in read_answers(tmp_path / "out").to_pylist() if answer["error"]]
    with pytest.raises(TwigVLMError, match=r"other options \(keep\); name another directory"):
        answer_dataset(tmp_path, tmp_path / "out", make_service, max_completion_tokens=4, keep=6)


def test_a_base_without_a_twig_answers_and_says_what_it_lacks(tmp_path):
    tiny_llava().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    service = OpenModel(str(tmp_path), device="cpu")(Limits())
    try:
        asked = [
            BatchLine(way, {**chat(max_completion_tokens=2, speculate=way), "model": str(tmp_path)})
            for way in ("none", "chain")
        ]
        found = {}
        BatchRun(service, lambda key, status, body: found.update({key: status})).run(asked)
        assert found == {"none": 200, "chain": 400}
    finally:
        service.stop()


def test_a_record_without_a_question_fails_alone(tmp_path):
    table = records(2).set_column(1, "question", pa.array(["what?", None], pa.string()))
    pq.write_table(table, tmp_path / "in.parquet")
    assert answer_dataset(tmp_path / "in.parquet", tmp_path / "out", make_service, max_completion_tokens=2) == 2
    errors = [answer["error"] for answer in read_answers(tmp_path / "out").to_pylist()]
    assert errors == [None, "question: must be a text"]


def test_a_record_that_kills_its_workers_ends_the_run(tmp_path):
    pq.write_table(records(1), tmp_path / "in.parquet")
    with pytest.raises(ray.exceptions.RayError):
        answer_dataset(tmp_path / "in.parquet", tmp_path / "out", make_dying_service)


def test_a_wrong_option_is_refused_before_any_record(tmp_path):
    pq.write_table(records(4), tmp_path / "in.parquet")
    for options, words in (({"retian": 64}, "retian"), ({"max_completion_tokens": 2048}, "at most 1024")):
        with pytest.raises(TwigVLMError, match=words):
            answer_dataset(tmp_path / "in.parquet", tmp_path / "out", make_service, **options)
    assert not (tmp_path / "out").exists()


def test_limits_reach_the_workers(service, tmp_path):
    pq.write_table(records(2), tmp_path / "in.parquet")
    assert answer_dataset(tmp_path / "in.parquet", tmp_path / "out", make_service, limits=Limits(max_tokens=8)) == 2
    check(service, tmp_path / "out", 2)


def test_a_source_without_its_columns_is_refused(tmp_path):
    pq.write_table(pa.table({"id": ["a"], "question": ["b"]}), tmp_path / "in.parquet")
    with pytest.raises(TwigVLMError, match="no column image"):
        answer_dataset(tmp_path / "in.parquet", tmp_path / "out", make_service)


def workers():
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_lost_worker_loses_no_record(service, tmp_path):
    pq.write_table(records(40), tmp_path / "in.parquet")
    out, killed = tmp_path / "out", []

    def kill():
        found = wait_until(lambda: list(out.glob("part-*.parquet")) and workers(), seconds=90)
        os.kill(found[0].pid, signal.SIGKILL)
        killed.append(found[0].pid)

    thread = threading.Thread(target=kill)
    thread.start()
    answer_dataset(tmp_path / "in.parquet", out, make_slow_service, workers=2, batch_size=4, max_completion_tokens=8)
    thread.join()
    assert killed, "no worker was there to be killed"
    check(service, out, 40)


def test_an_application_with_two_replicas_streams(service, client):
    serve.run(serve_app(make_service, num_replicas=2, ray_actor_options={"num_cpus": 1}), route_prefix="/")
    text = decoded(service, expected(service, "what is it?", [picture()], max_new_tokens=12))
    for _ in range(4):
        chunks = list(client.chat.completions.create(**chat(images=[picture()]), stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        assert len(chunks) > 4
    assert client.chat.completions.create(**chat(images=[picture()])).choices[0].message.content == text


def test_sapling_answers_on_two_workers_as_alone(sapling, tmp_path):
    photo = DEMO.read_bytes()
    asked = [
        ("What does the sign say?", photo),
        ("Describe the image.", photo),
        ("What is it?", base64.b64decode(picture().partition(",")[2])),
        ("How many things are there?", photo),
    ]
    rows = [{"id": f"r{number}", "question": text, "image": image} for number, (text, image) in enumerate(asked)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    options = {"workers": 2, "batch_size": 2, "max_completion_tokens": 16, **SIGNS}
    assert answer_dataset(tmp_path / "in.parquet", tmp_path / "out", SAPLING, **options) == 4
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == 2
    for (question, image), answer in zip(asked, read_answers(tmp_path / "out").to_pylist(), strict=True):
        ids = expected(sapling, question, [image], max_new_tokens=16, **SIGNS)
        assert answer["error"] is None
        assert (answer["answer"], answer["tokens"]) == (decoded(sapling, ids), len(ids))
        assert answer["visual_tokens"] == pytest.approx(64, abs=1)


def test_sapling_in_an_application_that_scales_itself(sapling, client):
    """Two replicas at least, where the default of a deployment is one."""
    app = serve_app(SAPLING, autoscaling_config={"min_replicas": 2, "max_replicas": 3})
    serve.run(app, name="sapling", route_prefix="/")
    (deployment,) = serve.status().applications["sapling"].deployments.values()
    assert deployment.replica_states == {"RUNNING": 2}
    image = f"data:image/png;base64,{base64.b64encode(DEMO.read_bytes()).decode()}"
    body = {**chat("What does the sign say?", [image], extra_body=SIGNS), "model": "sapling"}
    text = decoded(sapling, expected(sapling, "What does the sign say?", [image], max_new_tokens=12, **SIGNS))
    assert [client.chat.completions.create(**body).choices[0].message.content for _ in range(2)] == [text] * 2
