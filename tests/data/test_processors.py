"""The processor of a model: what is in its folder, and what is not."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from captioned_files import picture
from chat_models import save_qwen
from tiny_processors import image_processor, save_side_by_side, save_whole, tokenizer
from transformers import BertConfig, BlipConfig
from transformers.utils import logging as transformers_logging

from vlp_plugins.data.processors import load_processor, most_pixels, reads_text
from vlp_plugins.runtime.errors import DataError

IMAGES = [picture(1), picture(2)]
TEXTS = ["a red seven", "two"]


def call(processor: object) -> dict[str, torch.Tensor]:
    return dict(
        processor(  # type: ignore[operator]
            images=IMAGES, text=TEXTS, padding=True, truncation=True, return_tensors="pt"
        )
    )


def test_the_familys_own_processor_comes_first(tmp_path: Path) -> None:
    processor = load_processor(str(save_whole(tmp_path)))
    assert type(processor).__name__ == "BlipProcessor"
    assert reads_text(processor)


def test_tokenizer_and_image_processor_side_by_side_do_the_same(tmp_path: Path) -> None:
    whole = call(load_processor(str(save_whole(tmp_path / "whole"))))
    both = call(load_processor(str(save_side_by_side(tmp_path / "both"))))
    assert whole["input_ids"].shape == (2, 5)
    for name, tensor in whole.items():
        assert torch.equal(both[name], tensor)


def test_a_checkpoint_file_stands_for_its_folder(tmp_path: Path) -> None:
    save_side_by_side(tmp_path)
    (tmp_path / "model.pth").touch()
    assert call(load_processor(str(tmp_path / "model.pth")))["pixel_values"].shape == (2, 3, 8, 8)


def test_models_of_images_only(tmp_path: Path) -> None:
    image_processor().save_pretrained(tmp_path)
    processor = load_processor(str(tmp_path))
    assert not reads_text(processor)
    assert list(processor(images=IMAGES, return_tensors="pt")) == ["pixel_values"]
    with pytest.raises(DataError, match="no tokenizer, but the model reads text"):
        call(processor)


def test_pillow_does_the_work_and_no_advice_to_install_torchvision_appears(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_side_by_side(tmp_path)
    before = transformers_logging.get_verbosity()
    with caplog.at_level(logging.WARNING):
        processor = load_processor(str(tmp_path))
    assert type(processor.image_processor).__name__.endswith("Pil")  # type: ignore[attr-defined]
    assert not caplog.records
    assert transformers_logging.get_verbosity() == before


@pytest.mark.parametrize("config", [None, BertConfig()])
def test_missing_files_are_named(tmp_path: Path, config: BertConfig | None) -> None:
    if config is not None:  # transformers would make an empty tokenizer of this alone
        config.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"it needs .* processor_config.json or .*processor=\)$"):
        load_processor(str(tmp_path))
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="it needs tokenizer.json .* preprocessor_config.json"):
        load_processor(str(tmp_path))


def test_an_empty_tokenizer_is_none(tmp_path: Path) -> None:
    BlipConfig().save_pretrained(tmp_path)
    image_processor().save_pretrained(tmp_path)
    assert not reads_text(load_processor(str(tmp_path)))


def test_a_damaged_tokenizer_is_one_line(tmp_path: Path) -> None:
    save_whole(tmp_path)
    for path in tmp_path.iterdir():
        path.write_text("{")
    with pytest.raises(DataError) as raised:
        load_processor(str(tmp_path))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500 + len(str(tmp_path))


class TestLengthOfCaptions:
    def limit(self, folder: Path, **options: int) -> int:
        processor = load_processor(str(folder), **options)
        long = processor(text=["a " * 700], truncation=True, padding=True, return_tensors="pt",
                         images=IMAGES[:1])  # fmt: skip
        return long["input_ids"].shape[1]

    def test_the_tokenizer_decides(self, tmp_path: Path) -> None:
        assert self.limit(save_side_by_side(tmp_path, model_max_length=24)) == 24

    def test_else_the_positions_of_the_model(self, tmp_path: Path) -> None:
        save_side_by_side(tmp_path)
        BertConfig(max_position_embeddings=40).save_pretrained(tmp_path)
        assert self.limit(tmp_path) == 40

    def test_also_those_of_a_text_tower(self, tmp_path: Path) -> None:
        save_side_by_side(tmp_path)
        BlipConfig(text_config={"max_position_embeddings": 50}).save_pretrained(tmp_path)
        assert self.limit(tmp_path) == 50

    def test_else_the_user_who_cannot_ask_for_more(self, tmp_path: Path) -> None:
        save_side_by_side(tmp_path, model_max_length=24)
        assert self.limit(tmp_path, max_length=12) == 12
        assert self.limit(tmp_path, max_length=100) == 24
        with pytest.raises(DataError, match="at least 3, not 2"):
            load_processor(str(tmp_path), max_length=2)


def test_a_size_that_counts_pixels_is_no_side_of_an_image(tmp_path: Path) -> None:
    save_qwen(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    content = json.loads(file.read_text())
    for least, most in ((256 * 28 * 28, 1280 * 28 * 28), (56 * 56, 16384 * 28 * 28)):
        file.write_text(json.dumps(content | {"min_pixels": least, "max_pixels": most}))
        assert most_pixels(load_processor(str(tmp_path)).image_processor) == most  # type: ignore[attr-defined]
    file.write_text(json.dumps(content | {"max_pixels": 10**9}))
    with pytest.raises(DataError, match="an image of 1,000,000,000 pixels would take"):
        load_processor(str(tmp_path))


def test_a_tokenizer_with_code_of_its_own_is_not_replaced_by_another(tmp_path: Path) -> None:
    folder = save_side_by_side(tmp_path)
    load_processor(str(folder))
    file = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    with pytest.raises(DataError, match=r"needs code of its own \(the tokenizer Evil\)"):
        load_processor(str(folder))
