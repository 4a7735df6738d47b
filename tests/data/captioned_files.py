"""Small captioned images on disk. Picture i is filled with the colour (i, 0, 0)."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

from PIL import Image

from vlp_plugins.data.records import CaptionSource

CAPTIONS = ["a red seven", "two blue nines", "a green one", "the white four"]


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (6, 4), (number, 0, 0))


def encoded(number: int, kind: str = "PNG") -> bytes:
    data = BytesIO()
    picture(number).save(data, kind)
    return data.getvalue()


def read(source: CaptionSource, seed: int | None = None) -> list[tuple[int, str]]:
    """Red of the first pixel, and the caption, of every pair."""
    pairs = list(source.pairs(seed))
    assert all(image.mode == "RGB" for image, _ in pairs)
    return [(image.getpixel((0, 0))[0], text) for image, text in pairs]  # type: ignore[index]


def write_folder(folder: Path, captions: list[object], *, column: str = "text") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(len(captions)):
        (folder / f"{number:03}.png").write_bytes(encoded(number))
    rows = [{"file_name": f"{n:03}.png", column: text} for n, text in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder
