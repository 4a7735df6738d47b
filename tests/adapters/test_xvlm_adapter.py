"""X-VLM's adapter: retrieval, and the files that it loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from xvlm_adapter_examples import ADAPTER, tiny, tiny_batch

from vlp_adapters.xvlm import XvlmForPretraining, save_original
from vlp_plugins.runtime.errors import BatchError, UnsupportedError

# --- retrieval ---


@torch.no_grad()
def test_features_and_match_use_precomputed_embeddings() -> None:
    model, batch = tiny(), tiny_batch()
    features = ADAPTER.image_features(model, batch), ADAPTER.text_features(model, batch)
    for feature in features:
        assert feature.shape == (2, 8)
        torch.testing.assert_close(feature.norm(dim=-1), torch.ones(2))
    odds = ADAPTER.match(model, batch)
    assert odds.shape == (2,)
    mask = batch["attention_mask"]
    text = model.encode_text(batch["input_ids"], mask)
    image = model.encode_image(batch["pixel_values"])
    probability = model.match_logits(text, mask, image).softmax(dim=-1)[:, 1]
    torch.testing.assert_close(odds.sigmoid(), probability)
    made = {"text_embeds": text, "image_embeds": image, "attention_mask": mask}
    assert torch.equal(ADAPTER.match(model, made), odds)
    assert torch.equal(ADAPTER.image_features(model, made), features[0])
    assert torch.equal(ADAPTER.text_features(model, made), features[1])
    with pytest.raises(BatchError, match="no attention_mask"):
        ADAPTER.match(model, {"text_embeds": text, "image_embeds": image})


# --- files ---


def test_loads_what_save_pretrained_wrote(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = ADAPTER.load(str(tmp_path))
    assert isinstance(loaded, XvlmForPretraining)
    assert not loaded.training
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_loads_original_checkpoints(tmp_path: Path, name: str) -> None:
    model = tiny()
    save_original(model, tmp_path / name)
    loaded = ADAPTER.load(str(tmp_path / name))
    assert isinstance(loaded, XvlmForPretraining)
    assert not loaded.training
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


def test_loads_checkpoints_of_distributed_training_and_old_torch(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "model.pth"
    save_original(model, path)
    state = {f"module.{name}": value for name, value in torch.load(path)["model"].items()}
    torch.save({"model": state, "epoch": 3}, path, _use_new_zipfile_serialization=False)
    assert isinstance(ADAPTER.load(str(path)), XvlmForPretraining)


def test_is_quiet_about_formats_of_others(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "model.ckpt").write_bytes(b"")
    torch.save({"model": {"visual_encoder.cls_token": torch.ones(1)}}, tmp_path / "blip.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    names = [path.name for path in tmp_path.iterdir() if path.name != "config.json"]
    assert len(names) == 6
    for source in [str(tmp_path), "org/model", *(str(tmp_path / name) for name in names)]:
        assert ADAPTER.load(source) is None


def test_a_damaged_x_vlm_is_an_error(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    del state["itm_head.0.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"lacks 1 parameter.*itm_head\.0\.weight"):
        ADAPTER.load(str(tmp_path))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UnsupportedError, match="is damaged, truncated or no safetensors file"):
        ADAPTER.load(str(tmp_path))
    weights.unlink()
    with pytest.raises(UnsupportedError, match="cannot load the X-VLM model"):
        ADAPTER.load(str(tmp_path))
