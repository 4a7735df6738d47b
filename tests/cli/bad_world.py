"""Models, data and files that are broken, each in one way, in folders for the tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import tiny_models
from safetensors.torch import load_file, save_file
from torch import Tensor

PROJECTION = "text_encoder.bert.encoder.layer.0.intermediate.dense.weight"
CLIP_LAYER = "vision_model.encoder.layers.0.mlp.fc1.weight"
WORD_EMBEDDINGS = "text_encoder.bert.embeddings.word_embeddings.weight"


def make(folder: Path, models: Path, photos: Path, pruned: Path) -> dict[str, Path]:
    """Paths by the names that the tests use in their commands."""
    xvlm = models / "xvlm"
    world = {
        "xvlm": xvlm,
        "chinese_clip": models / "chinese_clip",
        "vit": models / "vit",
        "photos": photos,
        "masks": pruned / "masks-0.75.safetensors",
        "statistics": pruned / "statistics.safetensors",
    }

    def changed(
        name: str, change: Callable[[dict[str, Tensor]], object], source: Path = xvlm
    ) -> None:
        world[name] = folder / name
        shutil.copytree(source, folder / name)
        state = load_file(source / "model.safetensors")
        change(state)
        save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})

    changed("nan_weight", lambda state: state[PROJECTION][0].fill_(float("nan")))
    changed("nan_input", lambda state: state[WORD_EMBEDDINGS].fill_(float("inf")))
    changed("lacking", lambda state: state.pop(PROJECTION))
    changed("lacking_clip", lambda state: state.pop(CLIP_LAYER), models / "chinese_clip")
    world["wider"] = tiny_models.save_xvlm(folder / "wider", intermediate_size=32)
    world["no_processor"] = _without(xvlm, folder / "no_processor", "preprocessor_config.json")
    world["truncated_model"] = _truncated_model(xvlm, folder / "truncated_model")
    world["truncated_clip"] = _truncated_model(models / "chinese_clip", folder / "truncated_clip")

    world["empty"] = folder / "empty"
    world["empty"].mkdir()
    world["missing_images"] = shutil.copytree(photos, folder / "missing_images")
    (world["missing_images"] / "003.png").unlink()
    world["damaged_images"] = tiny_models.save_photos(folder / "damaged_images", 100)
    for number in range(94, 100):  # 6 of 100, after most batches
        (world["damaged_images"] / f"{number:03}.png").write_bytes(b"no image")
    world["no_metadata"] = _without(photos, folder / "no_metadata", "metadata.jsonl")

    for kind in ("masks", "statistics"):
        data = world[kind].read_bytes()
        world[f"truncated_{kind}"] = _file(folder / f"truncated_{kind}.safetensors", data[:-10])
        flipped = data[:-10] + bytes([data[-10] ^ 0xFF]) + data[-9:]
        world[f"corrupt_{kind}"] = _file(folder / f"corrupt_{kind}.safetensors", flipped)
    world["noise"] = _file(folder / "noise.bin", b"\x00" * 50)
    world["recipe"] = _file(folder / "typo.yaml", b"methdo: multiflow\n")
    world["taken"] = folder / "taken"
    world["taken"].mkdir()
    _file(world["taken"] / "precious", b"precious")
    return world


def _without(source: Path, target: Path, name: str) -> Path:
    shutil.copytree(source, target)
    (target / name).unlink()
    return target


def _truncated_model(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    data = (target / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(data[: len(data) // 2])
    return target


def _file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def listing(folder: Path) -> dict[str, int]:
    """Every file below a folder with its size, hidden ones too."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*")}
