"""Read one picture as the models expect it: 8-bit RGB, upright, on white where it was transparent."""

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from twigvlm.errors import TwigVLMError, one_line

MAX_PIXELS = 64_000_000
"""Largest image that is read (width x height): the models see at most a few hundred thousand pixels of it."""

_PLAIN_MODES = {"1", "L", "P", "RGB", "YCbCr", "HSV", "CMYK", "LA", "PA", "La", "RGBA", "RGBa", "RGBX"}
_ALPHA_MODES = {"LA", "PA", "La", "RGBA", "RGBa"}


def load_image(source: str | os.PathLike[str] | bytes | Image.Image) -> Image.Image:
    """A picture as upright 8-bit RGB.

    Palettes, grey, CMYK and 16-bit grey are converted, transparency is composited on white, and the EXIF orientation
    is applied. An animation or a file of several pages is refused, since nothing says which picture is meant; so are
    images of more than `MAX_PIXELS` and pixel formats without a stated range (32-bit integer and float).

    Args:
        source: a path, a file's bytes, or a PIL image, which is left as it is.

    Raises:
        TwigVLMError: one line that names the file, what is wrong with it and the remedy.
    """
    name = f"image {str(source)!r}" if isinstance(source, str | os.PathLike) else "image"
    if isinstance(source, str | os.PathLike):
        file = Path(source)
        if file.is_dir():
            raise TwigVLMError(f"{name}: is a directory; give the path of one image file")
        if not file.is_file():
            raise TwigVLMError(f"{name}: no such file; give the path of an existing image file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what is checked here, and of harmless flaws in metadata
        try:
            with _opened(source) as image:
                _refuse_unless_one_picture(name, image)
                image.load()
                deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
                return _to_rgb(name, _upright(image), deep)
        except TwigVLMError:
            raise
        except UnidentifiedImageError:
            raise TwigVLMError(f"{name}: not an image in a known format; save it as PNG or JPEG") from None
        except Image.DecompressionBombError:
            raise TwigVLMError(_too_large(name, "far more")) from None
        except PermissionError:
            raise TwigVLMError(f"{name}: may not be read; check the file's permissions") from None
        except MemoryError:
            raise TwigVLMError(f"{name}: needs more memory than there is; scale it down") from None
        except Exception as error:  # decoders raise whatever a broken file leads them to
            raise TwigVLMError(f"{name}: corrupt or truncated ({one_line(error)}); save or copy it anew") from None


def _opened(source: str | os.PathLike[str] | bytes | Image.Image) -> AbstractContextManager[Image.Image]:
    if isinstance(source, Image.Image):
        return nullcontext(source)
    return Image.open(BytesIO(source) if isinstance(source, bytes) else source)


def _too_large(name: str, pixels: str) -> str:
    return f"{name}: {pixels} than the limit of {MAX_PIXELS:,} pixels; scale it down"


def _refuse_unless_one_picture(name: str, image: Image.Image) -> None:
    """Checks on the header, before any pixel is decoded."""
    if image.width * image.height > MAX_PIXELS:
        raise TwigVLMError(_too_large(name, f"{image.width}x{image.height} pixels are more"))
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's MPO is one photograph; its further frames are previews
        raise TwigVLMError(f"{name}: holds {frames} frames or pages; save the one you mean as PNG")


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
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        # La and RGBa (premultiplied) have no direct way to RGBA in every Pillow
        image = image.convert({"La": "LA"}.get(image.mode, "RGBA")).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(pixels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """0..65535 to 0..255, each end to its end, rounded to the nearest."""
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
