"""Images of files of unknown origin: which formats are decoded, how large, and from where."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from vlp_plugins.bytes import check_read
from vlp_plugins.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is decoded, whatever a file is called. Others start programs on its bytes, as EPS does."""

OUTSIDE_VARIABLE = "VLP_READ_OUTSIDE"
_BYTES = 3  # of an RGB pixel
_PILLOW_LIMIT = threading.Lock()


def open_image(data: bytes) -> Image.Image:
    """An image of one of `FORMATS`, not decoded yet; `vlp_plugins.bytes.read_limit` bounds it.

    Args:
        data: content of its file.

    Raises:
        OSError: if it is of no such format, or damaged.
        ValueError: if it is too large.
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
    check_read(f"its image of {width} x {height} pixels", width * height * _BYTES, ValueError)
    return image


def read_image(path: Path) -> Image.Image:
    """`open_image` of a file.

    Raises:
        DataError: if the file cannot be read: not a damaged image, the next would fail as well.
        OSError, ValueError: as of `open_image`.
    """
    try:
        check_read(f"its file of {path.stat().st_size:,} bytes", path.stat().st_size, ValueError)
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return open_image(data)


def check_inside(
    path: str | os.PathLike[str], folders: Path | Sequence[Path], source: object
) -> None:
    """Checks that a path which data names lies in their folder; links in the folder may lead out.

    `VLP_READ_OUTSIDE=1` in the environment allows any path.

    Args:
        path: absolute, or relative to the working directory as the folders are.
        folders: of the data, one or several.
        source: the file that names the path, for messages.

    Raises:
        DataError: if it lies elsewhere.
    """
    if os.environ.get(OUTSIDE_VARIABLE, "0") not in ("", "0"):
        return
    # Without resolving links: a link that the user put into the folder is the user's choice.
    places = [folders] if isinstance(folders, Path) else folders
    lies = Path(os.path.abspath(path))  # noqa: PTH100
    if not any(lies.is_relative_to(os.path.abspath(place)) for place in places):  # noqa: PTH100
        raise DataError(
            f"{source} names {os.fspath(path)}, which is outside of "
            f"{' and '.join(map(str, places))}; link its folder there, or set "
            f"{OUTSIDE_VARIABLE}=1 if you trust the data"
        )
