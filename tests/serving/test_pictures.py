"""Pictures of requests are read as they are elsewhere, within the server's limits."""

import base64
import json
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from threading import Event, Lock

import pytest
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from tests.serving.servers import chat, picture, served, tiny_service, wait_until
from tests.serving.test_hostile import connect, post
from tests.test_images import LONG, chunk
from twigvlm.images import load_image
from twigvlm.serving import pictures
from twigvlm.serving.app import FETCHING
from twigvlm.serving.errors import RequestError
from twigvlm.serving.limits import Limits
from twigvlm.serving.pictures import check_pixels, read_picture
from twigvlm.serving.protocol import ChatRequest

NOWHERE = {}
"""Nothing was fetched."""


def stored(size=(20, 12), form="PNG", **options):
    data = BytesIO()
    Image.new("RGB", size, "red").save(data, form, **options)
    return data.getvalue()


def uri(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("text", [chunk(b"iCCP", b"profile\0\0" + LONG), chunk(b"zTXt", b"Comment\0\0" + LONG)])
def test_a_large_profile_or_text_does_not_matter(text):
    data = stored()
    at = data.index(b"IDAT") - 4
    found = read_picture(uri(data[:at] + text + data[at:]), 1000, NOWHERE)
    assert found.tobytes() == load_image(data).tobytes()


@pytest.mark.parametrize("pillow_s_limit", [None, 50])
def test_a_picture_that_is_too_large_is_to_be_scaled_down(monkeypatch, pillow_s_limit):
    """Pillow refuses far too large ones in a way of its own."""
    if pillow_s_limit:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_s_limit)
    with pytest.raises(RequestError, match=r"image_url: .* than the limit of 200 pixels; scale it down"):
        read_picture(picture(), 200, NOWHERE)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"no picture", "not an image in one of the formats PNG, JPEG, WEBP, GIF, BMP; save it as"),
        (stored(form="TIFF"), "not an image in one of the formats"),
        (stored()[:50], "image_url: corrupt or truncated"),
    ],
)
def test_what_is_no_picture_is_refused(data, words):
    with pytest.raises(RequestError, match=words):
        read_picture(uri(data), 1000, NOWHERE)


class Hosts:
    """In place of a fetcher: addresses with "slow" in them deliver once they are released."""

    def __init__(self, full=FETCHING):
        self.full, self.lock = full, Lock()
        self.began, self.released = Event(), Event()
        self.inside = self.most = 0
        self.asked = []

    def fetch(self, url, until):
        with self.lock:
            self.asked.append((url, until))
            self.inside += 1
            self.most = max(self.most, self.inside)
            if self.inside == self.full:
                self.began.set()
        if "slow" in url:
            assert self.released.wait(60)
        with self.lock:
            self.inside -= 1
        return stored()


def test_a_client_that_hangs_up_while_an_image_is_fetched_makes_room():
    hosts = Hosts(1)
    service = tiny_service(fetcher=hosts, limits=Limits(max_rows=1, max_waiting=1))
    with served(service) as address:
        try:
            gone = connect(address)
            body = json.dumps(chat(images=["https://slow.test/a"]))
            gone.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            assert hosts.began.wait(20)
            gone.close()
            wait_until(lambda: 'status="499"' in service.metrics.text())
            assert not hosts.released.is_set()
        finally:
            hosts.released.set()


@pytest.mark.parametrize("full", [1, FETCHING])
def test_slow_hosts_hold_up_nobody_else(full):
    hosts = Hosts(full)
    service = tiny_service(fetcher=hosts)
    with served(service) as address, ThreadPoolExecutor(FETCHING + 2) as pool:

        def ask(url):
            return post(address, chat(images=[url], max_completion_tokens=1))[0]

        try:
            slow = [pool.submit(ask, f"https://slow.test/{n}") for n in range(full if full == 1 else full + 2)]
            assert hosts.began.wait(20)
            assert ask(picture()) == 200
            if full == 1:
                assert ask("https://fast.test/a") == 200
            assert not any(one.done() for one in slow)
        finally:
            hosts.released.set()
        assert [one.result() for one in slow] == [200] * len(slow)
    assert hosts.most <= FETCHING
    assert service.memory.held == 0


def test_all_images_of_a_request_have_one_deadline_and_each_is_fetched_once():
    hosts = Hosts()
    service = tiny_service(fetcher=hosts, limits=Limits(waiting_seconds=40))
    try:
        arrived = time.monotonic()
        request = ChatRequest.model_validate(chat(images=[f"https://fast.test/{name}" for name in "aba"]))
        service.prepare(request, print, arrived)
        assert hosts.asked == [(f"https://fast.test/{name}", arrived + 40) for name in "ab"]
    finally:
        service.stop()


def test_images_that_come_too_late_are_refused(monkeypatch):
    def fetch(url, until):
        monkeypatch.setattr(pictures, "monotonic", lambda: until + 1)
        raise RequestError("image_url: slow.test does not deliver it")

    hosts = Hosts()
    hosts.fetch = fetch
    request = ChatRequest.model_validate(chat(images=["https://slow.test/a"]))
    with pytest.raises(RequestError, match="take too long to fetch; send them as data URIs") as refused:
        pictures.fetch_pictures(request, hosts, 0, 1000)
    assert (refused.value.status, refused.value.param) == (504, "messages.0")


def test_a_host_at_fault_is_told_from_a_request_at_fault(service, monkeypatch):
    def fetch(url, until):
        raise RequestError("image_url: slow.test does not deliver it", 502)

    hosts = Hosts()
    hosts.fetch = fetch
    monkeypatch.setattr(service, "fetcher", hosts)
    with pytest.raises(RequestError, match="does not deliver it") as refused:
        service.prepare(ChatRequest.model_validate(chat(images=["https://slow.test/a"])), print)
    assert (refused.value.status, refused.value.param) == (502, "messages.0")


def test_what_is_refused_anyway_is_not_fetched(service, monkeypatch):
    hosts = Hosts()
    monkeypatch.setattr(service, "fetcher", hosts)
    for options in ({"model": "other"}, {"n": 99}, {"images": ["https://fast.test/a"] * 17}):
        with pytest.raises(RequestError):
            service.fetch(ChatRequest.model_validate(chat(**{"images": ["https://fast.test/a"], **options})), 0)
    assert hosts.asked == []


def test_images_that_are_too_many_pixels_together_are_refused_undecoded(monkeypatch):
    service = tiny_service(limits=Limits(max_request_pixels=500))
    try:
        prepared = service.prepare(ChatRequest.model_validate(chat(images=[picture()] * 2)), print)
        assert prepared.prompt_tokens > 32
        monkeypatch.setattr("twigvlm.serving.messages.read_picture", None)
        images = [picture(), uri(stored(form="JPEG")), picture(form="WEBP")]
        with pytest.raises(RequestError, match="have 720 pixels together, of at most 500; scale them down") as refused:
            service.prepare(ChatRequest.model_validate(chat(images=images)), print)
        assert refused.value.param == "messages"
    finally:
        service.stop()


@pytest.mark.parametrize("data", [b"no picture", chunk(b"zTXt", b"Comment\0\0" + LONG)], ids=["broken", "long text"])
def test_an_image_that_does_not_say_its_size_counts_as_the_largest(data):
    if data != b"no picture":
        at = stored().index(b"IDAT") - 4
        data = stored()[:at] + data + stored()[at:]
    request = ChatRequest.model_validate(chat(images=[uri(data)] * 2))
    check_pixels(request, Limits(max_pixels=1000, max_request_pixels=2000), NOWHERE)
    with pytest.raises(RequestError, match="have 2,000 pixels together"):
        check_pixels(request, Limits(max_pixels=1000, max_request_pixels=1999), NOWHERE)


@pytest.mark.parametrize("count", [65, 750_000])
def test_a_jpeg_of_countless_segments_is_refused_unread(monkeypatch, count):
    """Pillow would copy all earlier ones for each."""
    segment, data = b"\xff\xe1\x00\x12Exif\0\0" + bytes(10), stored(form="JPEG")
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(RequestError, match="more than 64 segments of EXIF; save it again"):
        read_picture(uri(data[:2] + segment * count + data[2:]), 1000, NOWHERE)


def test_a_photograph_with_a_few_segments_is_read():
    segment, data = b"\xff\xe1\x00\x12Exif\0\0" + bytes(10), stored(form="JPEG")
    assert read_picture(uri(data[:2] + segment * 3 + data[2:]), 1000, NOWHERE).size == (20, 12)


def test_a_jpeg_of_countless_scans_is_refused_unread(monkeypatch):
    """The decoder would go through the whole picture for each."""
    data = stored(form="JPEG", progressive=True)
    assert data.count(b"\xff\xda") > 5
    assert read_picture(uri(data), 1000, NOWHERE).size == (20, 12)
    at = data.rindex(b"\xff\xda")
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(RequestError, match="more than 100 scans; save it again"):
        read_picture(uri(data[:at] + data[at:-2] * 100 + data[-2:]), 1000, NOWHERE)


@pytest.mark.parametrize("kind", [1, 2])
def test_a_bmp_of_runs_is_refused_unread(monkeypatch, kind):
    """Pillow would decode it in Python."""
    data = stored(form="BMP")
    assert read_picture(uri(data), 1000, NOWHERE).size == (20, 12)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(RequestError, match=r"is a compressed BMP, .* save it as PNG"):
        read_picture(uri(data[:30] + kind.to_bytes(4, "little") + data[34:]), 1000, NOWHERE)


def test_percent_signs_without_end_are_refused_unread(monkeypatch):
    monkeypatch.setattr(pictures, "from_data_uri", None)
    with pytest.raises(RequestError, match="more than 100,000 percent signs; encode it in base64"):
        read_picture("data:," + "%" * 100_001, 1000, NOWHERE)


def test_nothing_more_is_fetched_for_nobody_or_beyond_the_limit():
    asked = []

    class Host:
        def fetch(self, url, until):
            asked.append(url)
            return bytes(600)

    def gone():
        if asked:
            raise RequestError("nobody waits")

    request = ChatRequest.model_validate(chat(images=[f"https://one.test/{name}" for name in "abc"]))
    with pytest.raises(RequestError, match="nobody waits"):
        pictures.fetch_pictures(request, Host(), time.monotonic() + 60, 10_000, gone)
    assert len(asked) == 1
    with pytest.raises(RequestError, match="more than 1,000 bytes together; send fewer or smaller ones"):
        pictures.fetch_pictures(request, Host(), time.monotonic() + 60, 1000)
    assert len(asked) == 3


def test_the_frames_of_an_animation_are_not_counted(monkeypatch):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    data = BytesIO()
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:])
    monkeypatch.delattr(GifImageFile, "n_frames")
    with pytest.raises(RequestError, match="several frames"):
        read_picture(uri(data.getvalue()), 1000, NOWHERE)
