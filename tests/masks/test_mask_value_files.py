"""Files of masks with new values: exact, refused by readers that know none, checked as a whole."""

from dataclasses import replace

import pytest
import torch
from test_mask_files import refusal, rewrite
from toy_masks import Pretraining, random_masks
from toy_values import valued_masks

from vlp_plugins.masks.masks import FORMAT, Masks
from vlp_plugins.runtime.artifacts import read_artifact
from vlp_plugins.runtime.errors import MaskError


@pytest.fixture
def masks():
    return valued_masks(Pretraining())[0]


@pytest.fixture
def path(tmp_path, masks):
    masks.save(tmp_path / "masks.safetensors")
    return tmp_path / "masks.safetensors"


def test_what_is_loaded_is_what_was_saved(path, masks):
    loaded = Masks.load(path)

    assert loaded == masks
    assert loaded.manifest == masks.manifest
    assert list(loaded.new_values) == list(masks)
    for name, values in masks.new_values.items():
        assert torch.equal(loaded.new_values[name], values)


def test_a_reader_that_knows_no_values_refuses_the_file_and_reads_others(path, tmp_path):
    before_values = replace(FORMAT, schema=1)

    with pytest.raises(MaskError, match="format 2, newer than the 1 that this version reads"):
        read_artifact(path, before_values)

    random_masks(Pretraining()).save(tmp_path / "plain")
    tensors, header = read_artifact(tmp_path / "plain", before_values)
    assert header["schema"] == 1
    assert list(tensors) == ["text.ffn", "text.out", "vision.ffn", "vision.patch"]


def test_every_truncation_is_noticed(path):
    whole = path.read_bytes()
    for size in (0, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "damaged, truncated or no mask file" in refusal(path)


def test_every_changed_byte_is_noticed(path):
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for position in range(start, len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 0x10
        path.write_bytes(changed)
        assert "is damaged" in refusal(path)


def test_values_of_another_length_or_type(path, masks):
    kept = masks.counts().by_weight["text.ffn"].kept
    rewrite(path, bits={"values:text.ffn": torch.zeros(kept + 1)})
    assert f"is damaged: the new values of 'text.ffn' are torch.float32 [{kept + 1}]" in refusal(
        path
    )

    rewrite(path, bits={"values:text.ffn": torch.zeros(kept, dtype=torch.float64)})
    assert f"torch.float64 [{kept}] instead of torch.float32 [{kept}]" in refusal(path)


def test_values_that_are_not_finite(path, masks):
    values = masks.new_values["text.ffn"].clone()
    values[0] = float("nan")
    rewrite(path, bits={"values:text.ffn": values})

    assert f"is damaged: 1 of {len(values)} new values of 'text.ffn' are NaN" in refusal(path)


def test_a_file_that_promises_values_has_all_of_them_and_no_more(path, tmp_path):
    rewrite(path, bits={"values:stranger": torch.zeros(1)})
    assert "is damaged: there are new values of 'stranger', but no mask" in refusal(path)

    plain = tmp_path / "plain.safetensors"
    random_masks(Pretraining()).save(plain)
    rewrite(plain, schema=2)
    assert "is damaged: the new values of 'vision.patch' are missing" in refusal(plain)


def test_a_file_of_the_first_format_has_no_values(tmp_path):
    plain = tmp_path / "plain.safetensors"
    random_masks(Pretraining()).save(plain)
    rewrite(plain, bits={"values:text.ffn": torch.zeros(3)})

    assert "'values:text.ffn' is not in its manifest" in refusal(plain)


def test_a_file_that_is_written_in_place_does_not_change_what_was_loaded(path, masks):
    loaded = Masks.load(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert loaded == masks
