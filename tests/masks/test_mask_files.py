"""Mask files: an exact round trip, and one line that says what is wrong with any other file."""

import errno
import json
import os
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from toy_masks import Captioning, Pretraining, random_masks

from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import FORMAT, Masks
from vlp_plugins.runtime.artifacts import checksum
from vlp_plugins.runtime.errors import MaskError, OutputError
from vlp_plugins.runtime.version import __version__


@pytest.fixture
def masks():
    return random_masks(
        Pretraining(),
        parameters={"edges": True},
        sparsity=0.6,
        calibration={"fingerprint": "abc", "samples": 8, "batches": 2},
    )


@pytest.fixture
def path(tmp_path, masks):
    masks.save(tmp_path / "masks.safetensors")
    return tmp_path / "masks.safetensors"


def rewrite(path, *, bits=None, **changes):
    """Writes the file anew with other bits or manifest fields and the checksum that fits them, as
    another program might."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()[FORMAT.key])
    tensors |= bits or {}
    header |= {"checksum": checksum(tensors), **changes}
    save_file(tensors, path, metadata={FORMAT.key: json.dumps(header)})


def refusal(path):
    with pytest.raises(MaskError) as caught:
        Masks.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_what_is_loaded_is_what_was_saved(path, masks):
    loaded = Masks.load(path)

    assert loaded == masks
    assert list(loaded) == list(masks)
    assert loaded.manifest == masks.manifest


def test_a_file_takes_a_bit_per_element_and_ordinary_permissions(path, masks):
    with safe_open(path, framework="pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    mask = os.umask(0)
    os.umask(mask)

    assert sizes == {"vision.patch": 2, "vision.ffn": 2, "text.ffn": 3, "text.out": 3}
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_equal_masks_of_one_storage_can_be_saved(tmp_path, masks):
    bits = masks.packed["text.ffn"]
    Masks({**masks.packed, "text.out": bits}, masks.manifest).save(tmp_path / "m.safetensors")

    assert torch.equal(Masks.load(tmp_path / "m.safetensors").packed["text.out"], bits)


def test_parameters_that_json_lacks_become_text(tmp_path):
    random_masks(Pretraining(), parameters={"dtype": torch.float32}).save(tmp_path / "m")

    assert Masks.load(tmp_path / "m").manifest.parameters == {"dtype": "torch.float32"}


def test_an_existing_file_is_only_replaced_on_request(path, masks):
    with pytest.raises(OutputError, match="exists already"):
        masks.invert().save(path)
    assert Masks.load(path) == masks

    masks.invert().save(path, overwrite=True)
    assert Masks.load(path) == masks.invert()


def test_a_full_disk_leaves_the_old_file_and_nothing_else(path, masks, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="no space left"):
        masks.invert().save(path, overwrite=True)

    assert Masks.load(path) == masks
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_file(tmp_path):
    assert "is not a file" in refusal(tmp_path / "nowhere.safetensors")


def test_every_truncation_is_noticed(path):
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "damaged, truncated or no mask file" in refusal(path)


def test_every_flipped_bit_of_a_mask_is_noticed(path):
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for position in range(start, len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            assert "is damaged" in refusal(path)


def test_bytes_that_changed_places_are_noticed(path):
    """The number of kept elements, and so every count in the manifest, stays the same."""
    changed = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(changed[:8], "little")
    first, second = changed[start : start + 2]
    assert first != second  # both of one mask
    changed[start : start + 2] = [second, first]
    path.write_bytes(changed)

    assert "is damaged: the checksum differs; make or copy it again" in refusal(path)


def test_text_and_checkpoints_are_no_mask_files(tmp_path):
    text = tmp_path / "masks.safetensors"
    text.write_text("no masks at all " * 10)
    assert "no mask file" in refusal(text)

    checkpoint = tmp_path / "model.safetensors"
    save_file({"encoder.weight": torch.ones(2, 2)}, checkpoint)
    assert "is not a mask file of vlp-plugins (perhaps a checkpoint?)" in refusal(checkpoint)

    published = tmp_path / "masks.pth"
    torch.save({"encoder.weight_pruning_mask": torch.ones(2, 2)}, published)
    assert "`vlp masks import` reads published .pth files" in refusal(published)


def test_a_newer_format_asks_for_an_upgrade(path):
    rewrite(path, schema=99, made_by="vlp_plugins 9.0")

    message = refusal(path)
    assert "format 99" in message
    assert "vlp_plugins 9.0: upgrade" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": 3},
        {"weights": {"text.ffn": {"shape": [7, -3], "modality": "text", "kept": 1}}},
        {"weights": {"text.ffn": {"shape": [7, 3], "modality": "text"}}},
        {"weights": {"text.ffn": {"shape": [7, 3], "modality": None, "kept": 1}}},
        {"adapter": None},
        {"adapter_settings": []},
    ],
)
def test_a_damaged_manifest(path, changes):
    rewrite(path, **changes)

    assert "damaged manifest" in refusal(path)


@pytest.mark.parametrize("schema", ["one", 0, None])
def test_a_damaged_version(path, schema):
    rewrite(path, schema=schema)

    assert f"format {schema!r}" in refusal(path)


def test_names_and_shapes_are_protected_by_the_structure_hash(path, masks):
    weights = {
        name.replace("out", "in"): record
        for name, record in asdict(masks.manifest)["weights"].items()
    }
    rewrite(path, weights=weights)
    assert "structure" in refusal(path)


def test_bits_of_another_length_or_type(path):
    rewrite(path, bits={"text.ffn": torch.zeros(4, dtype=torch.uint8)})
    assert "'text.ffn' is torch.uint8 [4] instead of torch.uint8 [3]" in refusal(path)

    rewrite(path, bits={"text.ffn": torch.zeros(3)})
    assert "'text.ffn' is torch.float32 [3] instead of torch.uint8 [3]" in refusal(path)


def test_tensors_and_manifest_must_list_the_same_weights(path, masks):
    rewrite(path, bits={"stranger": torch.zeros(1, dtype=torch.uint8)})
    assert "'stranger' is not in its manifest" in refusal(path)

    only = random_masks(Captioning())
    rewrite(path, **asdict(only.manifest))
    assert "'caption.cross' is missing" in refusal(path)


# --- masks of versions that had faults ---


def manifest_of(version: str, **fields: Any) -> Manifest:
    masks = random_masks(Pretraining())
    return replace(masks.manifest, made_by=f"vlp_plugins {version}", **fields)


DATA = {"fingerprint": "f", "batches": 2, "samples": 4}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"method": "omp"}, []),
        ({"method": "multiflow", "calibration": DATA}, []),
        ({"method": "omp", "adapter": "module"}, []),
        ({"method": "itersnip", "adapter": "blip", "calibration": DATA}, []),
        ({"method": "taylor", "adapter": "blip", "calibration": DATA}, []),
        ({"method": "taylor", "adapter": "blip"}, ["closure"]),
        ({"method": "id*platon", "parameters": {"id_factors": "f"}}, ["all but equal", "closure"]),
        ({"method": "omp", "parameters": {"allocation": "id", "id_factors": "f"}}, ["all but eq"]),
        ({"method": "wanda", "adapter": "module", "calibration": DATA}, ["labels"]),
        ({"method": "chita", "adapter": "module", "calibration": DATA}, ["in place", "labels"]),
    ],
)
def test_masks_that_a_faulty_version_may_have_made_are_known(fields, said):
    found = manifest_of("0.1.0", **fields).doubts()
    assert len(found) == len(said)
    assert all(words in sentence for words, sentence in zip(said, found, strict=True))
    assert all(sentence.startswith("vlp_plugins 0.1.0 made these masks") for sentence in found)
    for version in ("0.2.0.dev0", "0.2.0", "0.10.0", "1.0.0", __version__):
        assert manifest_of(version, **fields).doubts() == []
    assert replace(manifest_of("0.1.0", **fields), made_by="another 0.1.0").doubts() == []


def test_masks_of_an_experiment_may_be_of_the_worst_trial():
    assert "optimize_mode" in manifest_of("0.1.0", method="omp").doubts(of_trial=True)[0]
    assert manifest_of("0.2.0", method="omp").doubts(of_trial=True) == []
