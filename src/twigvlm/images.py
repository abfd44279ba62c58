"""Read a picture in the form that models expect: 8-bit RGB, upright, with transparency on white."""

import base64
import os
import re
import warnings
import zlib
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, Final, NamedTuple, TypeAlias
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import MAX_TEXT_CHUNK, MAX_TEXT_MEMORY

from twigvlm.errors import TwigVLMError, one_line

Picture: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
"""A path, a data URI, a file's bytes, a PIL image, or an 8-bit array [height, width, 3]."""

MAX_PIXELS = 64_000_000
"""Largest image that is read, in pixels (width times height). Models see at most a few hundred thousand pixels of it."""
MAX_ASPECT = 200
"""Largest ratio of an image's sides. From longer ones, processors that scale the short side up would make too many pixels."""

_URI = re.compile(r"data:|[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # not C:/, and pathlib makes one slash of two
_SHOWN = 300  # characters of a name

_PLAIN_MODES = {"1", "L", "P", "RGB", "YCbCr", "HSV", "CMYK", "LA", "PA", "La", "RGBA", "RGBa", "RGBX"}
_PNG_TEXTS = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}


class _WithoutWarnings:
    """Suppresses warnings while any thread is inside. Filters belong to the whole process, so the last thread restores them."""

    def __init__(self) -> None:
        self._changing, self._within = Lock(), 0

    def __enter__(self) -> None:
        with self._changing:
            if not self._within:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._changing:
            self._within -= 1
            if not self._within:
                self._filters.__exit__(None, None, None)


WITHOUT_WARNINGS: Final = _WithoutWarnings()
"""A context for Pillow, which warns about what is checked here anyway, and about harmless flaws in metadata."""


def load_image(source: Picture) -> Image.Image:
    """Read a picture as upright 8-bit RGB.

    Palettes, grey, CMYK and 16-bit grey are converted, transparency is composited on white, and the EXIF orientation
    is applied. Animations and files of several pages are rejected, because it is unclear which picture is meant. So are
    images of more than `MAX_PIXELS` or with sides beyond `MAX_ASPECT`, and pixel formats without a defined range (32-bit
    integer and float).

    Args:
        source: a path, a data URI, a file's bytes, an 8-bit array, or a PIL image, which is not modified. Nothing is
            fetched from the network.

    Raises:
        TwigVLMError: one line that names the file, what is wrong with it, and the remedy.
    """
    name = f"image {short_name(source)!r}" if isinstance(source, str | os.PathLike) else "image"
    if isinstance(source, str | os.PathLike):
        if str(source)[:5].lower() == "data:":
            source = from_data_uri(name, str(source))
        else:
            _check_path(name, source)
    elif not isinstance(source, bytes | Image.Image):
        source = _from_array(name, source)
    return read_image(name, source)


def read_image(
    name: str,
    source: str | os.PathLike[str] | bytes | Image.Image,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """Read a file or a PIL image in the same way as `load_image`.

    Args:
        name: name of the picture in error messages.
        source: the path of a file, its bytes, or a PIL image.
        formats: Pillow's names of the formats that may be read; None: all formats.
        max_pixels: largest width times height, up to `MAX_PIXELS`; None: `MAX_PIXELS`.

    Raises:
        TwigVLMError: one line that names the picture, what is wrong with it, and the remedy.
    """
    rules = _Rules(formats, min(MAX_PIXELS, max_pixels or MAX_PIXELS))
    with WITHOUT_WARNINGS:
        try:
            try:
                return _read(name, source, rules)
            except ValueError as error:
                if "MAX_TEXT_" not in str(error) or isinstance(source, Image.Image):
                    raise
                data = source if isinstance(source, bytes) else Path(source).read_bytes()
                return _read(name, _without_large_texts(data), rules)
        except TwigVLMError:
            raise
        except UnidentifiedImageError:
            known = "a known format" if formats is None else f"one of the formats {', '.join(formats)}"
            raise TwigVLMError(f"{name}: not an image in {known}; save it as PNG or JPEG") from None
        except Image.DecompressionBombError:
            raise TwigVLMError(_too_large(name, "far more", rules.max_pixels)) from None
        except PermissionError:
            raise TwigVLMError(f"{name}: may not be read; check the file's permissions") from None
        except MemoryError as error:
            raise TwigVLMError(f"{name}: needs more memory than is available; scale it down") from error
        except Exception as error:  # decoders raise whatever a broken file leads them to
            raise TwigVLMError(
                f"{name}: corrupt or truncated ({one_line(error)}); save or copy the file again"
            ) from None


def from_data_uri(name: str, uri: str) -> bytes:
    """Decode a data URI to the bytes of a file.

    Args:
        name: name of the picture in error messages.
        uri: the data URI, in base64 or percent-encoded; white space in base64 is ignored.

    Raises:
        TwigVLMError: one line that names the picture, what is wrong with it, and the remedy.
    """
    head, comma, data = uri.partition(",")
    try:
        if not comma:
            raise ValueError("no comma before the data")
        decoded = unquote_to_bytes(data)
        if not head.lower().endswith(";base64"):
            return decoded
        return base64.b64decode(b"".join(decoded.split()), validate=True)
    except ValueError as error:  # binascii's is one
        raise TwigVLMError(
            f"{name}: not a valid data URI ({one_line(error)}); encode the file as data:image/png;base64,…"
        ) from None


def is_uri(source: object) -> bool:
    """Whether a source is a data URI or an address with a scheme, and not a path."""
    return isinstance(source, str | os.PathLike) and _URI.match(str(source)) is not None


def is_remote(source: object) -> bool:
    """Whether a source is a remote address. Such files are never fetched."""
    return is_uri(source) and str(source)[:5].lower() != "data:"


def short_name(source: str | os.PathLike[str]) -> str:
    """A path or a data URI as text for messages, shortened if it is very long."""
    text = str(source)
    return text if len(text) <= _SHOWN else f"{text[:40]}…"


def _check_path(name: str, path: str | os.PathLike[str]) -> None:
    # os.path's answer to a name that no file can have, too long or with a null byte, is False
    if os.path.isfile(path):
        return
    if os.path.isdir(path):
        raise TwigVLMError(f"{name}: is a directory; give the path of one image file")
    if is_remote(path):
        raise TwigVLMError(f"{name}: is a remote address; download the file and give its path")
    raise TwigVLMError(f"{name}: no such file; give the path of an existing image file")


def _from_array(name: str, source: Any) -> Image.Image:
    from transformers.image_transforms import to_pil_image

    try:
        array = np.asarray(source)
        if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3:
            return Image.fromarray(array)
        if array.dtype == np.uint8:
            return to_pil_image(array)  # of torch's layout, [3, height, width]
        kind = str(array.dtype) if array.ndim else type(source).__name__
    except (TypeError, ValueError) as error:  # a device that numpy cannot read, or a shape of no picture
        kind = one_line(error)
    raise TwigVLMError(
        f"{name}: not a picture ({kind}); give a path, a file's bytes, a PIL image or an 8-bit array [height, width, 3]"
    )


class _Rules(NamedTuple):
    """What may be read: formats (None: all), and the largest width times height."""

    formats: tuple[str, ...] | None
    max_pixels: int


def _read(name: str, source: str | os.PathLike[str] | bytes | Image.Image, rules: _Rules) -> Image.Image:
    with _opened(source, rules.formats) as image:
        _refuse_unless_one_picture(name, image, rules.max_pixels)
        image.load()
        deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        picture = _to_rgb(name, _upright(image), deep)
        picture.info = {}  # it is upright now, whatever its metadata said
        return picture


def _opened(
    source: str | os.PathLike[str] | bytes | Image.Image, formats: tuple[str, ...] | None
) -> AbstractContextManager[Image.Image]:
    if isinstance(source, Image.Image):
        return nullcontext(source)
    return Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=formats)


def _without_large_texts(data: bytes) -> bytes:
    """A PNG without the texts and colour profiles that Pillow finds too large; its pixels do not depend on them.

    Once the texts together are longer than Pillow reads, the remaining ones are removed without unpacking them.
    """
    kept, start, length = [data[:8]], 8, 0
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        kind, body = data[start + 4 : start + 8], data[start + 8 : end - 4]
        large = False
        if kind in _PNG_TEXTS:
            size = MAX_TEXT_CHUNK if length > MAX_TEXT_MEMORY else _text_length(kind, body)
            length += size
            large = size >= MAX_TEXT_CHUNK or length > MAX_TEXT_MEMORY
        if not large:
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def _text_length(kind: bytes, body: bytes) -> int:
    """Length of a text in bytes, as far as Pillow would read it."""
    text = body.partition(b"\0")[2]
    compressed = kind != b"tEXt"
    if kind == b"iTXt":  # flag, method, language, translated keyword, text
        compressed, text = text[:1] == b"\1", text[2:].split(b"\0", 2)[-1]
    elif compressed:
        text = text[1:]
    if compressed:
        try:
            text = zlib.decompressobj().decompress(text, MAX_TEXT_CHUNK)
        except zlib.error:  # Pillow passes over these
            return 0
    return len(text)


def _too_large(name: str, pixels: str, limit: int) -> str:
    return f"{name}: {pixels} than the limit of {limit:,} pixels; scale it down"


def _refuse_unless_one_picture(name: str, image: Image.Image, max_pixels: int) -> None:
    """Checks on the header, before any pixel is decoded."""
    size = f"{image.width}x{image.height} pixels"
    if image.width * image.height > max_pixels:
        raise TwigVLMError(_too_large(name, f"{size} are more", max_pixels))
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise TwigVLMError(f"{name}: of {size} one side is more than {MAX_ASPECT} times the other; crop it")
    # A camera's MPO is one photograph; its further frames are previews. To count a GIF's frames would take reading all of them.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise TwigVLMError(f"{name}: holds several frames or pages; save the one you mean as PNG")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF says nothing about orientation; the pixels are good
        return image


def _to_rgb(name: str, image: Image.Image, deep: bool) -> Image.Image:
    """`deep`: its grey has 16 bits; older Pillows open such a PNG in a mode that does not tell."""
    if deep:
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode not in _PLAIN_MODES:
        raise TwigVLMError(f"{name}: pixel format {image.mode} has no fixed range of values; save it as 8-bit PNG")
    if image.has_transparency_data:
        # La and RGBa (premultiplied) have no direct way to RGBA in every Pillow
        image = image.convert({"La": "LA"}.get(image.mode, "RGBA")).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(pixels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Scale 0..65535 linearly to 0..255, rounded to the nearest integer."""
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
