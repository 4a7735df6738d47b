"""BLIP's adapter: losses, features, and the files that it loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from blip_adapter_examples import ADAPTER, GOLDEN, tiny, tiny_batch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

from benchmarks.parity.blip import batches_from_golden, model_from_golden
from vlp_adapters.blip import BlipForPretraining, save_original
from vlp_plugins.models.adapter import CaptioningAdapter, MatchingAdapter, RetrievalAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import BatchError, UnsupportedError

# --- losses ---


def test_losses_are_the_published_ones_and_advance_the_state_like_training() -> None:
    model = model_from_golden(GOLDEN)
    recorded = json.loads((GOLDEN / "outputs.json").read_text())["sequence"]
    for batch, step in zip(batches_from_golden(GOLDEN), recorded, strict=True):
        drawn = step["negatives"][0]
        negatives = (drawn["image_neg"], drawn["text_neg"])
        losses = ADAPTER.losses(model, batch, negatives=negatives)
        assert list(losses) == ["itc", "itm", "lm"]
        for name, published in zip(losses, ("ita", "itm", "lm"), strict=True):
            expected = step["losses"][published]
            assert losses[name].item() == pytest.approx(expected, abs=1e-5)


def test_the_state_can_be_left_alone() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = ADAPTER.losses(model, tiny_batch(), update_state=False)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    moved = ADAPTER.losses(model, tiny_batch())
    assert not torch.equal(before["image_queue"], model.image_queue)
    torch.testing.assert_close(kept, moved)  # the twins were copies: no difference on batch one


def test_negatives_are_drawn_from_the_batch_and_can_be_injected() -> None:
    model, batch = tiny(), batch_of_four()
    before = torch.random.get_rng_state()
    one = ADAPTER.losses(model, batch, update_state=False)
    two = ADAPTER.losses(model, batch, update_state=False)
    assert torch.equal(before, torch.random.get_rng_state())
    assert one["itm"] == two["itm"]
    values = {
        ADAPTER.losses(model, batch, negatives=([n, 0, 0, 0], [n, 0, 0, 0]), update_state=False)[
            "itm"
        ].item()
        for n in (1, 2, 3)
    }
    assert len(values) == 3


def batch_of_four() -> dict[str, Tensor]:
    batch = tiny_batch()
    other = batch["pixel_values"].flip(0) * 2
    ids = batch["input_ids"] * 3
    return {
        "pixel_values": torch.cat([batch["pixel_values"], other]),
        "input_ids": torch.cat([batch["input_ids"], ids]),
        "attention_mask": torch.cat([batch["attention_mask"]] * 2),
    }


def test_one_pair_has_no_wrong_partner() -> None:
    one = {name: value[:1] for name, value in tiny_batch().items()}
    with pytest.raises(BatchError, match=r"only 1 pair\(s\); use batches of at least 2"):
        ADAPTER.losses(tiny(), one)


def test_gradients_reach_every_prunable_weight() -> None:
    model = tiny()
    sum(ADAPTER.losses(model, tiny_batch()).values()).backward()
    for name, weight in WeightMap.of(model, ADAPTER).items():
        assert weight.parameter.grad is not None, name
        assert weight.parameter.grad.abs().sum() > 0, name


# --- features ---


@torch.no_grad()
def test_features_matching_and_captions_are_the_models() -> None:
    assert isinstance(ADAPTER, RetrievalAdapter)
    assert isinstance(ADAPTER, MatchingAdapter)
    assert isinstance(ADAPTER, CaptioningAdapter)
    model, batch = tiny(), tiny_batch()
    text = (batch["input_ids"], batch["attention_mask"])
    images = ADAPTER.image_features(model, {"pixel_values": batch["pixel_values"]})
    torch.testing.assert_close(images, model.get_image_features(batch["pixel_values"]))
    torch.testing.assert_close(ADAPTER.text_features(model, batch), model.get_text_features(*text))
    embeds = model.encode_image(batch["pixel_values"])
    logits = model.match_logits(*text, embeds)
    odds = ADAPTER.match(model, batch)
    torch.testing.assert_close(odds.sigmoid(), logits.softmax(dim=1)[:, 1])
    known = {"image_embeds": embeds, "input_ids": text[0], "attention_mask": text[1]}
    assert torch.equal(ADAPTER.match(model, known), odds)
    ids = ADAPTER.caption(model, batch, max_length=7)
    assert torch.equal(ids, model.generate(batch["pixel_values"], max_length=7))
    assert ids.shape[1] <= 7


# --- files ---


def test_loads_what_save_pretrained_wrote(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = ADAPTER.load(str(tmp_path))
    assert isinstance(loaded, BlipForPretraining)
    assert not loaded.training
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert WeightMap.of(loaded, ADAPTER).structure == WeightMap.of(model, ADAPTER).structure


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_loads_original_checkpoints(tmp_path: Path, name: str) -> None:
    model = tiny()
    save_original(model, tmp_path / name)
    loaded = ADAPTER.load(str(tmp_path / name))
    assert isinstance(loaded, BlipForPretraining)
    assert not loaded.training
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_an_original_checkpoint_of_a_task_becomes_the_model_of_it(tmp_path: Path) -> None:
    path = tmp_path / "captioning.pth"
    save_original(tiny(), path)
    state = {
        name: value
        for name, value in torch.load(path)["model"].items()
        if name.startswith(("visual_encoder.", "text_decoder."))
    }
    torch.save({"model": state}, path)
    model = ADAPTER.load(str(path))
    assert type(model) is BlipForConditionalGeneration
    words = model.text_decoder.cls.predictions.decoder.weight
    assert torch.equal(words, state["text_decoder.bert.embeddings.word_embeddings.weight"])


def test_is_quiet_about_formats_of_others(tmp_path: Path) -> None:
    config = BlipConfig(
        vision_config=tiny().config.vision_config.to_dict(),
        text_config=tiny().config.text_config.to_dict(),
    )
    BlipForImageTextRetrieval(config).save_pretrained(tmp_path / "retrieval")
    save_file({"vision_encoder.patch_embed.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    torch.save({"model": {"encoder.weight": torch.ones(1)}}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    for source in ("org/model", *map(str, tmp_path.iterdir())):
        assert ADAPTER.load(source) is None


def test_a_damaged_blip_is_an_error(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    del state["itm_head.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"lacks 1 parameter.*itm_head\.weight"):
        ADAPTER.load(str(tmp_path))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UnsupportedError, match="is damaged, truncated or no safetensors file"):
        ADAPTER.load(str(tmp_path))


def test_every_parameter_has_the_name_of_the_original() -> None:
    original = load_file(GOLDEN / "model.safetensors")
    model = model_from_golden(GOLDEN)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(original[ADAPTER.original_name(path) or ""], parameter)
    assert ADAPTER.original_name("text_model.encoder.layer.0.output.dense.weight") is None
    assert ADAPTER.original_name("encoder.layers.0.mlp.fc1.weight") is None  # of a tower alone
