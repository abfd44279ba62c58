"""Requests that are malformed or meant to harm, without end: what a server must answer with 4xx, and survive."""

import base64
import json
import random
import struct
import zlib

from tests.serving.servers import NAME, chat, picture

_ODD = [
    None, True, -1, 0, 10**30, 1e308, -1e-300, "", " ", "\u0000", "\ud800", "é" * 50, [], {}, [[]], {"a": {}}, "x" * 5000,
    "../../etc/passwd", "file:///etc/passwd", "http://169.254.169.254/", "{{ 7*7 }}", "{% for x in y %}", "<|im_end|>",
    "<image>", "$(id)", "'; DROP TABLE", float("nan"), float("inf"),
]  # fmt: skip
_FIELDS = [
    "model", "messages", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed",
    "stop", "response_format", "retain", "keep", "final_wipe", "refocus", "pruner", "speculate", "details", "tools", "logprobs",
    "scout", "diverse", "retain_per_image",
    "chat_template", "chat_template_kwargs", "functions", "logit_bias", "user", "__class__", "top_logprobs", "audio",
]  # fmt: skip


def _png(width, height, data=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def _uri(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


_PICTURES = [
    "data:", "data:,", "data:image/png;base64,", "data:image/png;base64,%%%", "data:image/png;base64,AAAA", "data:text/html,<b>",
    "http://localhost/", "https://127.0.0.1/a.png", "https://example.com/a.png", "file:///etc/passwd", "/etc/passwd", "C:\\a.png",
    "//host/a", "https://[::1]/", "https://[", "javascript:alert(1)", "\u0000", "",
    _uri(_png(30000, 30000)), _uri(_png(2**31 - 1, 1)), _uri(_png(0, 0)), _uri(_png(1, 5000, b"\0" * 20000)),
    _uri(_png(4000, 3999)), _uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run", "image/eps"),
    _uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), _uri(b"GIF89a" + b"\xff" * 40, "image/gif"),
    _uri(b"\x89PNG\r\n\x1a\n" + b"\xff" * 60), _uri(b"BM" + b"\xff" * 60, "image/bmp"), _uri(b"RIFF\xff\xff\xff\x7fWEBPVP8 "),
    _uri(b"II*\0" + b"\xff" * 60, "image/tiff"), _uri(b"\xff\xd8\xff\xe0" + b"\0" * 60, "image/jpeg"), _uri(b"PK\x03\x04" * 9),
]  # fmt: skip


def _nested(draw):
    depth = draw.choice([50, 500, 20000])
    opening, closing = draw.choice(["[]", ('{"a":', "}")])
    return f'{{"model":"{NAME}","messages":{opening * depth}{closing * depth}}}'.encode()


def _field(draw):
    body = chat()
    for _ in range(draw.randint(1, 3)):
        body[draw.choice(_FIELDS)] = draw.choice(_ODD)
    return json.dumps(body).encode()


def _message(draw):
    body = chat()
    part = draw.choice([*_ODD, {"type": draw.choice(["text", "image_url", "image", "video", "file", None])}])
    content = draw.choice([part, [part], [part, part], [{"type": "text", "text": draw.choice(_ODD)}]])
    message = {"role": draw.choice(["user", "system", "tool", "assistant", "root", None]), "content": content}
    body["messages"] = draw.choice([[message], [message, message], message, [draw.choice(_ODD)]])
    return json.dumps(body).encode()


def _image(draw):
    return json.dumps(chat(images=[draw.choice([*_PICTURES, picture()]), draw.choice(_PICTURES)])).encode()


def _text(draw):
    broken = json.dumps(chat("é" * draw.randint(1, 9))).encode()
    at = draw.randrange(len(broken))
    return draw.choice([
        broken[:at], broken[:at] + bytes([draw.randrange(256)]) + broken[at + 1 :], draw.randbytes(draw.randint(0, 300)), b"",
        b"null", b"[]", b"1", b'"x"', b"\xff\xfe{}", b"NaN", b'{"model":' + b"9" * 5000 + b"}", broken * 2,
        json.dumps(chat("x" * draw.choice([200, 9000, 100000]))).encode(),
    ])  # fmt: skip


def _schema(draw):
    schema = draw.choice([
        {"type": "nonsense"}, {"$ref": "https://example.com/schema"}, {"$ref": "#/nowhere"}, {"pattern": "(((((a+)+)+)+)+)$"},
        {"type": "string", "pattern": "("}, {"minLength": 10**9, "type": "string"}, {"enum": []}, {"allOf": [{}] * 3000},
        {"type": "array", "minItems": 10**7}, {"$ref": "#"}, {"x-guidance": {"whitespace_flexible": "x"}}, {"not": {}},
        {"anyOf": [{"const": "x" * 60000}]},
    ])  # fmt: skip
    kind = draw.choice(["json_schema", "json_schema", "json_object", "grammar"])
    form = {"type": kind, "json_schema": draw.choice([{"name": "a", "schema": schema}, schema, None])}
    return json.dumps(chat(max_completion_tokens=2, response_format=form)).encode()


_KINDS = (_field, _field, _message, _message, _image, _text, _nested, _schema)
_HEADERS = [
    {}, {}, {}, {"Content-Type": "text/plain"}, {"Content-Type": "multipart/form-data"}, {"Host": "evil.test"},
    {"Authorization": "Bearer \xff"}, {"Cookie": "x" * 3000}, {"Content-Encoding": "gzip"}, {"Origin": "https://evil.test"},
]  # fmt: skip
_PATHS = [
    *["/v1/chat/completions"] * 12, "/v1/completions", "/v1/models/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd",
    "/v1/models/%00", "/examples/../index.html", "//", "/v1/chat/completions/",
]  # fmt: skip


def request(seed):
    """A request: method, path, headers and body. The same seed gives the same one."""
    draw = random.Random(seed)
    body = draw.choice(_KINDS)(draw)
    method = draw.choice(["POST"] * 12 + ["GET", "PUT", "DELETE", "OPTIONS"])
    return method, draw.choice(_PATHS), {"Content-Type": "application/json", **draw.choice(_HEADERS)}, body


def send(connection, seed):
    """Send one to a server; its status.

    Args:
        connection: of `http.client`.
        seed: of `request`.
    """
    method, path, headers, body = request(seed)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    response.read()
    return response.status
