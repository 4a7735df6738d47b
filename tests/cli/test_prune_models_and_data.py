"""`vlp prune` on every model family, and on data that is not as it should be."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from PIL import Image
from safetensors import safe_open
from transformers import (
    AutoImageProcessor,
    AutoModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
)
from vlp_command import Command

import vlp_plugins
from vlp_plugins import prune
from vlp_plugins.masks.masks import Masks
from vlp_plugins.masks.sparse import sparse_model


def only_masks(out: Path) -> Masks:
    return Masks.load(out / "masks-0.5.safetensors")


@pytest.mark.parametrize(
    ("model", "options", "modalities"),
    [
        ("blip", [], {"vision", "text"}),
        ("vit", [], {"vision"}),
        ("vit", ["--adapter", "module"], {"model"}),
        ("chinese_clip", ["--adapter", "module"], {"model"}),
        ("chinese_clip", [], {"vision", "text"}),
        ("chinese_clip", ["--method", "snip"], {"vision", "text"}),
        ("clip", [], {"vision", "text"}),
        ("clip", ["--method", "snip"], {"vision", "text"}),
        ("siglip", [], {"vision", "text"}),
        ("siglip", ["--method", "snip"], {"vision", "text"}),
        ("xvlm", ["--dtype", "bfloat16"], {"vision", "text", "fusion"}),
        ("blip", ["--variant", "published"], {"vision", "text"}),
    ],
)
def test_every_family_and_any_transformers_model(
    vlp: Command, models, photos, tmp_path, model, options, modalities
) -> None:
    out = tmp_path / "out"
    vlp(
        "prune", "--model", models / model, *options, "--sparsity", "0.5", "--data", photos,
        "--out", out, "--save-model",
    )  # fmt: skip
    masks = only_masks(out)
    assert set(masks.counts().by_modality) == modalities
    adapter = [] if "--adapter" not in options else options
    vlp("masks", "verify", out / "masks-0.5.safetensors", out / "model-0.5", *adapter)
    AutoModel.from_pretrained(out / "model-0.5")


def test_a_model_of_images_only_that_no_family_has(vlp: Command, models, photos, tmp_path) -> None:
    folder, out = tmp_path / "swin", tmp_path / "out"
    sizes = {"image_size": 16, "patch_size": 4, "window_size": 2, "embed_dim": 8}
    config = SwinConfig(**sizes, depths=[1, 1], num_heads=[2, 2])
    SwinModel(config).save_pretrained(folder)
    for file in (models / "vit").glob("*processor*"):
        shutil.copy(file, folder)
    vlp("prune", "--model", folder, "--sparsity", "0.5", "--data", photos, "--out", out)
    assert only_masks(out).manifest.adapter == "transformers"


@pytest.mark.parametrize("name", ["blip", "clip", "xvlm", "vit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_number_format_of_a_checkpoint_is_kept(
    vlp: Command, models: Path, photos: Path, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    half, out = tmp_path / "half", tmp_path / "out"
    vlp_plugins.load(models / name, dtype=dtype).save_pretrained(half)  # type: ignore[operator]
    assert {p.dtype for p in vlp_plugins.load(half).parameters()} == {dtype}
    as_asked = vlp_plugins.load(half, dtype="float32")
    assert {p.dtype for p in as_asked.parameters()} == {torch.float32}
    words = ("--processor", models / name, "--data", photos, "--sparsity", "0.5")
    vlp("prune", "--model", half, *words, "--out", out, "--save-model")
    masks = out / "masks-0.5.safetensors"
    vlp("masks", "verify", masks, out / "model-0.5")
    with safe_open(out / "model-0.5" / "model.safetensors", "pt") as written:
        formats = {written.get_tensor(key).dtype for key in written.keys()}  # noqa: SIM118
    assert {each for each in formats if each.is_floating_point} == {dtype}
    vlp("masks", "apply", masks, half, "--sparse", "--out", tmp_path / "sparse")
    assert {p.dtype for p in sparse_model(tmp_path / "sparse").parameters()} == {dtype}
    assert {p.dtype for p in vlp_plugins.load(tmp_path / "sparse").parameters()} == {dtype}


def test_gradients_in_float16_are_warned_of(
    vlp: Command, models: Path, photos: Path, tmp_path: Path
) -> None:
    words = ("--model", models / "clip", "--data", photos, "--sparsity", "0.5", "--dtype")
    for method, dtype, warned in (
        ("snip", "float16", True), ("snip", "bfloat16", False), ("wanda", "float16", False),
    ):  # fmt: skip
        out = tmp_path / f"{method}-{dtype}"
        result = vlp("prune", *words, dtype, "--method", method, "--out", out)
        assert ("small gradients are lost" in result.stderr) == warned


def test_statistics_of_a_half_precision_model_are_sums_in_float64(
    vlp: Command, models: Path, photos: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    vlp_plugins.load(models / "vit", dtype="bfloat16").save_pretrained(half)  # type: ignore[operator]
    words = ("--processor", models / "vit", "--data", photos, "--sparsity", "0.5")
    vlp("prune", "--model", half, *words, "--out", tmp_path / "out")
    with safe_open(tmp_path / "out" / "statistics.safetensors", "pt") as found:
        sums = [found.get_tensor(key) for key in found.keys()]  # noqa: SIM118
    assert any(each.dtype == torch.float64 for each in sums)
    assert not any(each.dtype in (torch.bfloat16, torch.float16) for each in sums)


def test_images_without_captions_are_enough_for_a_model_of_images(
    vlp, models, photos, tmp_path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in photos.glob("*.png"):
        (bare / path.name).write_bytes(path.read_bytes())
    words = ("--model", models / "vit", "--sparsity", "0.5", "--data", bare)
    vlp("prune", *words, "--out", tmp_path / "o")
    assert only_masks(tmp_path / "o").sparsity == 0.5


def test_gradient_methods_read_the_classes_of_a_folder(vlp, models, tmp_path) -> None:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**tiny_models.VISION, num_labels=2))
    model.save_pretrained(tmp_path / "classifier")
    processor = AutoImageProcessor.from_pretrained(models / "vit", backend="pil")
    processor.save_pretrained(tmp_path / "classifier")
    for name in ("cat", "dog"):
        tiny_models.save_photos(tmp_path / "classes" / name, 6)
        (tmp_path / "classes" / name / "metadata.jsonl").unlink()
    words = ["--model", tmp_path / "classifier", "--sparsity", "0.5", "--method", "snip"]
    words += ["--device", "cpu"]
    vlp("prune", *words, "--data", tmp_path / "classes", "--out", tmp_path / "o")

    pixels = [
        processor(images=Image.open(path), return_tensors="pt")["pixel_values"]
        for path in sorted((tmp_path / "classes").rglob("*.png"))
    ]
    batch = {"pixel_values": torch.cat(pixels), "labels": torch.tensor([0] * 6 + [1] * 6)}
    own = ViTForImageClassification.from_pretrained(tmp_path / "classifier")
    assert only_masks(tmp_path / "o") == prune(own, [batch], method="snip", sparsity=0.5)

    flat = tmp_path / "classes" / "cat"
    refused = vlp("prune", *words, "--data", flat, "--out", tmp_path / "p", code=2)
    assert "give images in one folder per class" in refused.stderr


@pytest.mark.parametrize("family", ["clip", "siglip", "xvlm"])
def test_a_model_of_texts_without_a_tokenizer(vlp, models, photos, tmp_path, family) -> None:
    shutil.copytree(models / family, tmp_path / "m")
    for path in tmp_path.glob("m/*token*"):
        path.unlink()
    words = ["--model", tmp_path / "m", "--sparsity", "0.5", "--data", photos]
    refused = vlp("prune", *words, "--out", tmp_path / "o", code=2)
    assert re.search(r"reads text.*tokenizer.json .or vocab.txt. and tokenizer_c", refused.stderr)
    assert "padding=" not in refused.stderr
    whole = ["--processor", models / family, "--device", "cpu", "--out", tmp_path / "o"]
    vlp("prune", *words, *whole)


def test_skipped_images_are_counted(vlp, xvlm, photos, tmp_path) -> None:
    many = tiny_models.save_photos(tmp_path / "many", 30)
    (many / "007.png").write_bytes(b"no image")
    result = vlp(
        "prune", "--model", xvlm, "--sparsity", "0.5", "--data", many, "--out", tmp_path / "o"
    )
    assert "images that could not be used: 1 of 30" in result.stdout
    assert re.fullmatch(r"warning: .* 1 of 30 records .*007.png.*\n", result.stderr)
    assert "1 of 30" in (tmp_path / "o" / "report.html").read_text()


def test_what_siglip_gave_is_not_read_for_clip_though_names_and_shapes_are_alike(
    vlp: Command, models: Path, photos: Path, tmp_path: Path
) -> None:
    data = ["--data", photos, "--batch-size", "3", "--device", "cpu"]
    wanda = ["--method", "wanda", "--sparsity", "0.5"]
    vlp("prune", "--model", models / "siglip", *wanda, *data, "--out", tmp_path / "siglip")
    vlp("prune", "--model", models / "clip", *wanda, *data, "--out", tmp_path / "clip")
    many = tiny_models.save_photos(tmp_path / "many", 24)
    vlp("id", models / "siglip", "--data", many, "--device", "cpu", "--out", tmp_path / "id")
    clip = ["--model", models / "clip", "--device", "cpu"]
    profile = tmp_path / "id" / "id-profile.json"
    for command in (
        ["prune", *clip, *wanda, "--statistics", tmp_path / "siglip" / "statistics.safetensors"],
        ["prune", *clip, "--method", "id*omp", "--sparsity", "0.5", "--id-profile", profile],
        ["sensitivity", *clip[1:], *data[:4], "--pairs", "3", "--id-profile", profile],
    ):
        found = vlp(*command, "--out", tmp_path / "new", code=2)
        assert "adapter 'siglip'" in found.stderr
        assert "adapter 'clip'" in found.stderr
        assert "mean other weights" in found.stderr
    pair = (tmp_path / name / "masks-0.5.safetensors" for name in ("clip", "siglip"))
    assert "adapter 'clip', the second of one of adapter 'siglip'" in (
        vlp("masks", "diff", *pair, code=2).stderr
    )
    assert not (tmp_path / "new").exists()
