"""Images of files of unknown origin: which formats are decoded, and how large."""

from __future__ import annotations

import threading
from io import BytesIO
from pathlib import Path

from PIL import Image

from vlp_plugins.runtime.errors import DataError
from vlp_plugins.runtime.untrusted import check_read

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is decoded, by content and not by name. Others start programs on its bytes, as EPS does."""

_BYTES = 3  # of an RGB pixel
_SHORT_SIDE = 448
_PILLOW_LIMIT = threading.Lock()


def open_image(data: bytes) -> Image.Image:
    """The image in the content of a file, of one of `FORMATS`, not decoded yet.

    Raises:
        OSError: if it is of no such format, or damaged.
        ValueError: if it is larger than `vlp_plugins.runtime.untrusted.read_limit`.
    """
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    # Pillow's own limit on pixels only warns, or refuses what `read_limit` was raised for.
    with _PILLOW_LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(BytesIO(data), formats=known)
        finally:
            Image.MAX_IMAGE_PIXELS = before
    width, height = image.size
    # A model's processor enlarges it until the shorter side has this many pixels.
    enlarged = _SHORT_SIDE**2 * max(image.size) // max(1, min(image.size))
    size = max(width * height, enlarged) * _BYTES
    check_read(f"its image of {width} x {height} pixels", size, ValueError)
    return image


VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"})


def check_no_video(path: Path) -> None:
    """Raises `DataError` for a file of a video, by its name."""
    if path.suffix.lower() in VIDEO_SUFFIXES:
        raise DataError(
            f"{path} is a video, and videos are not read: give its frames as images, several to a "
            "conversation, or in Python batches of the model's processor, with pixel_values_videos"
        )


def read_image(path: Path) -> Image.Image:
    """`open_image` of a file.

    Raises:
        DataError: if the file cannot be read, or is a video: not a damaged image, the next would
            fail as well.
        OSError, ValueError: as of `open_image`.
    """
    check_no_video(path)
    try:
        check_read(f"its file of {path.stat().st_size:,} bytes", path.stat().st_size, ValueError)
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return open_image(data)
