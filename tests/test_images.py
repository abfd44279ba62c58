import base64
import struct
import zlib
from io import BytesIO
from pathlib import Path
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import MAX_TEXT_CHUNK

from twigvlm import images
from twigvlm.errors import TwigVLMError
from twigvlm.images import load_image

RED = (200, 30, 40)


def save(path, image, **options):
    image.save(path, **options)
    return path


def refused(path, *words):
    with pytest.raises(TwigVLMError) as caught:
        load_image(path)
    message = str(caught.value)
    assert "\n" not in message
    assert repr(str(path)) in message
    for word in words:
        assert word in message
    return message


def test_plain_rgb_comes_back_exactly(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image = load_image(save(tmp_path / "a.png", Image.fromarray(pixels)))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), pixels)


def test_accepts_str_and_path(tmp_path):
    path = save(tmp_path / "a.png", Image.new("RGB", (2, 2), RED))
    assert load_image(str(path)).tobytes() == load_image(path).tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_become_rgb(tmp_path, mode):
    image = load_image(save(tmp_path / "a.png", Image.new("RGB", (4, 4), "white").convert(mode)))
    assert image.mode == "RGB"
    assert image.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(tmp_path, mode):
    picture = Image.new(mode, (4, 4), 0)  # fully transparent black
    picture.putpixel((0, 0), (10, 10, 10, 255) if mode == "RGBA" else (10, 255))
    image = load_image(save(tmp_path / "a.png", picture))
    assert image.getpixel((0, 0)) == (10, 10, 10)
    assert image.getpixel((3, 3)) == (255, 255, 255)


def test_half_transparent_is_blended(tmp_path):
    image = load_image(save(tmp_path / "a.png", Image.new("RGBA", (2, 2), (0, 0, 0, 128))))
    assert image.getpixel((0, 0)) == (127, 127, 127)


def test_transparent_palette_and_colour_key(tmp_path):
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 1), 1)
    image = load_image(save(tmp_path / "p.png", palette, transparency=0))
    assert (image.getpixel((0, 0)), image.getpixel((1, 1))) == ((255, 255, 255), (255, 0, 0))
    keyed = load_image(save(tmp_path / "k.png", Image.new("RGB", (2, 2), RED), transparency=RED))
    assert keyed.getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("RGBA", (2, 2), (*RED, 0)).quantize()).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    pixels = np.array([[0, 65535, 32768, 257 * 7]], dtype=np.uint16)
    for name in ("a.png", "a.tiff"):
        image = load_image(save(tmp_path / name, Image.fromarray(pixels)))
        assert np.asarray(image)[0, :, 0].tolist() == [0, 255, 128, 7]


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    image = load_image(save(tmp_path / "a.jpg", Image.new("RGB", (16, 16), RED).convert("CMYK"), quality=95))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - RED).max() <= 4


def test_exif_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (30, 10), "white")
    picture.paste((0, 0, 0), (0, 0, 15, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise: the left half is on top
    image = load_image(save(tmp_path / "a.jpg", picture, exif=exif, quality=95))
    assert image.size == (10, 30)
    assert image.getpixel((5, 2))[0] < 50
    assert image.getpixel((5, 27))[0] > 200


def test_missing_directory_and_empty(tmp_path):
    refused(tmp_path / "none.png", "no such file")
    refused(tmp_path, "is a directory")
    empty = tmp_path / "empty.png"
    empty.touch()
    refused(empty, "not an image", "save it as")


def test_name_with_line_break_stays_on_one_line(tmp_path):
    refused(tmp_path / "two\nlines.png", "no such file")


def test_text_file(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_text("this is no picture")
    refused(path, "not an image")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_truncated_files(tmp_path, suffix, part):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = save(tmp_path / f"a.{suffix}", noise)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    refused(path)


def test_flipped_bytes_in_a_png(tmp_path):
    path = save(
        tmp_path / "a.png", Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64), dtype=np.uint8))
    )
    data = bytearray(path.read_bytes())
    data[100:120] = bytes(20)
    path.write_bytes(data)
    refused(path, "corrupt")


@pytest.mark.parametrize("side", [8_001, 10_000, 20_000])  # over our limit, over Pillow's warning, over Pillow's error
def test_huge_images_are_refused_before_decoding(tmp_path, side, monkeypatch):
    path = save(tmp_path / "a.png", Image.new("1", (side, side)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    refused(path, "64,000,000 pixels", "scale it down")


def test_limit_is_inclusive(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", Image.new("RGB", (10, 10)))
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    assert load_image(path).size == (10, 10)
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    refused(path, "10x10", "99 pixels")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_animations_and_pages_are_refused(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    path = save(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:])
    refused(path, "several frames or pages", "save the one you mean as PNG")


def test_still_gif_is_read(tmp_path):
    assert load_image(save(tmp_path / "a.gif", Image.new("RGB", (8, 8), "red"))).getpixel((0, 0)) == (255, 0, 0)


def test_camera_mpo_is_one_photograph(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    path = save(tmp_path / "a.mpo", frames[0], save_all=True, append_images=frames[1:])
    assert load_image(path).getpixel((8, 8))[0] > 200


@pytest.mark.parametrize("mode", ["I", "F"])
def test_formats_without_a_range_are_refused(tmp_path, mode):
    refused(save(tmp_path / "a.tiff", Image.new(mode, (4, 4))), f"pixel format {mode}", "8-bit")


def test_a_16_bit_png_in_the_mode_of_older_pillows():
    image = Image.fromarray(np.array([[0, 65535, 32768, 257 * 7]], dtype=np.int32))
    assert image.mode == "I"
    image.format = "PNG"
    assert np.asarray(load_image(image))[0, :, 0].tolist() == [0, 255, 128, 7]


def uri(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def stored(image, kind="PNG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_a_data_uri_is_read_as_its_file_is():
    data = stored(Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)))
    wanted = load_image(data).tobytes()
    assert load_image(uri(data)).tobytes() == wanted
    assert load_image(uri(data).replace("data:", "DATA:")).tobytes() == wanted
    assert load_image("data:image/png," + quote_from_bytes(data)).tobytes() == wanted


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("data:image/png;base64", ["not a valid data URI", "no comma"]),
        *((f"data:image/png;base64,{data}", ["not a valid data URI"]) for data in ("AAAAA", "@@@@")),
        (uri(b"\0" * 4500), ["data:image/png;base64,AAAA", "…", "not an image in a known format"]),
        ("https://example.org/cat.jpg", ["'https://example.org/cat.jpg'", "remote address", "download"]),
        (Path("https://example.org/cat.jpg"), ["remote address"]),
        ("s3://bucket/cat.jpg", ["remote address"]),
        ("a" * 5000, ["no such file"]),
        ("a\0b.png", ["no such file"]),
        ({"path": "a.png"}, ["not a picture (dict)", "a PIL image"]),
        (None, ["not a picture (NoneType)"]),
        (np.zeros((4, 4, 3)), ["not a picture (float64)", "8-bit array"]),
        (np.zeros((2, 3, 4, 4), dtype=np.uint8), ["not a picture", "8-bit array"]),
    ],
)
def test_other_sources_are_refused_in_one_short_line(source, words):
    with pytest.raises(TwigVLMError) as caught:
        load_image(source)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    for word in words:
        assert word in message


@pytest.mark.parametrize("size", [(7, 9), (3, 50), (1, 50)])
def test_an_array_is_a_picture(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for given in (pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
        assert np.array_equal(np.asarray(load_image(given)), pixels)


@pytest.mark.parametrize("size", [(2100, 10), (10, 2100), (30000, 2)])
def test_very_long_pictures_are_refused_before_decoding(tmp_path, size, monkeypatch):
    path = save(tmp_path / "a.png", Image.new("RGB", size))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    refused(path, f"{size[0]}x{size[1]} pixels", "200 times", "crop it")


def test_the_longest_pictures_are_read(tmp_path):
    assert load_image(save(tmp_path / "a.png", Image.new("RGB", (2000, 10)))).size == (2000, 10)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


LONG = zlib.compress(b"all the history of a picture " * 120_000)  # 3.5 MB


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        chunk(b"zTXt", b"Comment\0\0" + LONG),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
        chunk(b"iCCP", b"profile\0\0" + LONG),
        chunk(b"zTXt", b"Comment\0\0" + LONG) * 2 + chunk(b"zTXt", b"Comment\0\0nothing"),
    ],
)
def test_long_texts_in_a_png_do_not_matter(tmp_path, text, behind):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8))
    data = stored(picture, exif=exif)
    at = data.index(b"IEND" if behind else b"IDAT") - 4
    path = tmp_path / "a.png"
    path.write_bytes(data[:at] + text + data[at:])
    assert load_image(path).tobytes() == load_image(path.read_bytes()).tobytes() == load_image(data).tobytes()


def test_many_texts_in_a_png_do_not_matter():
    """Together they are too long for Pillow, none of them alone; those behind them are not even unpacked."""
    data = stored(Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)))
    at = data.index(b"IDAT") - 4
    texts = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(MAX_TEXT_CHUNK - 1))) * 70
    assert load_image(data[:at] + texts + data[at:]).tobytes() == load_image(data).tobytes()


def test_a_truncated_png_with_a_long_text_is_refused(tmp_path):
    data = stored(Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64), dtype=np.uint8)))
    at = data.index(b"IDAT") - 4
    path = tmp_path / "a.png"
    path.write_bytes((data[:at] + chunk(b"zTXt", b"Comment\0\0" + LONG) + data[at:])[:-2000])
    refused(path, "corrupt or truncated")


def test_what_was_read_is_read_as_the_same(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    once = load_image(save(tmp_path / "a.jpg", Image.new("RGB", (30, 10), RED), exif=exif))
    again = load_image(once)
    assert again.size == once.size == (10, 30)
    assert again.tobytes() == once.tobytes()
