"""CLIP: names, real tokens, streams, losses, features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from clip_examples import CLIP, END, clip_config, images, made, pairs, texts
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPForImageClassification,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlp_adapters import inputs
from vlp_plugins.loading import load_model
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import gather, prune
from vlp_plugins.runtime.errors import BatchError, UnsupportedError
from vlp_plugins.tasks.retrieval import recall_at_k, retrieval

ATTENTION = ("query", "key", "value", "output")
PARTS = {
    "vision": [f"attention.{part}" for part in ATTENTION] + ["mlp.fc1", "mlp.fc2"],
    "text": [f"self.{part}" for part in ATTENTION] + ["ffn.fc1", "ffn.fc2"],
}


def parts(tower: str) -> set[str]:
    return {f"{tower}.{i}.{part}" for i in range(2) for part in PARTS[tower]}


def clip(end: int = END) -> CLIPModel:
    return made(CLIPModel, clip_config(end))


# --- names ---


def test_a_part_is_called_as_in_the_other_families() -> None:
    weights = WeightMap.of(clip(), CLIP)
    assert set(weights) == parts("vision") | parts("text")
    assert weights["text.1.ffn.fc1"].depth == 1
    assert {name: len(members) for name, members in weights.by_modality().items()} == {
        "vision": 12,
        "text": 12,
    }


def test_every_class_has_the_names_of_its_towers() -> None:
    config = clip_config()
    vision, text = config.vision_config, config.text_config
    for model, expected in (
        (CLIPVisionModel(vision), parts("vision")),
        (CLIPVisionModelWithProjection(vision), parts("vision")),
        (CLIPForImageClassification(config), parts("vision")),
        (CLIPTextModel(text), parts("text")),
        (CLIPTextModelWithProjection(text), parts("text")),
    ):
        assert CLIP.claims(model)
        assert set(WeightMap.of(model, CLIP)) == expected


def test_masks_of_the_dual_encoder_fit_its_towers_and_land_where_for_task_says() -> None:
    model = clip()
    weights = WeightMap.of(model, CLIP)
    generator = torch.Generator().manual_seed(0)
    kept = {name: torch.rand(w.shape, generator=generator) < 0.5 for name, w in weights.items()}
    masks = Masks.from_dense(kept, Manifest.for_weights(weights, method="test"))
    tower = CLIPTextModel(clip_config().text_config)
    masks.apply(tower, CLIP)
    assert torch.equal(
        tower.get_parameter("encoder.layers.1.mlp.fc1.weight") != 0, masks["text.1.ffn.fc1"]
    )
    classifier = made(CLIPForImageClassification, clip_config())
    masks.apply(classifier, CLIP)
    where = CLIP.for_task("classification", model)
    assert {name for name, paths in where.items() if not paths} == parts("text")
    for name, paths in where.items():
        for path in paths:
            assert torch.equal(classifier.get_parameter(path) != 0, masks[name])
    assert CLIP.for_task("retrieval", model) == CLIP.for_task("pretraining", model)


def test_tasks_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="CLIP knows no .*'vqa'.*classification"):
        CLIP.for_task("vqa", clip())
    with pytest.raises(UnsupportedError, match="CLIPVisionModel is not the dual encoder"):
        CLIP.for_task("retrieval", CLIPVisionModel(clip_config().vision_config))


def test_wrapped_layers_are_refused() -> None:
    model = clip()
    model.text_model.encoder.layers[1].mlp.fc1 = torch.nn.Sequential()
    with pytest.raises(UnsupportedError, match="text_model.encoder.layers.1.mlp.fc1 is a Seq"):
        WeightMap.of(model, CLIP)


# --- real tokens ---


def real_text_tokens(batch: dict[str, Tensor], end: int = END) -> Tensor:
    (_, text) = CLIP.streams(clip(end), batch)
    (real,) = text.real.values()
    assert real is not None
    return real


def test_real_are_the_tokens_up_to_the_first_end_token() -> None:
    expected = [[token != END for token in row] for row in texts()["input_ids"].tolist()]
    for row in expected:
        row[row.index(False)] = True  # the end token itself
    assert real_text_tokens(pairs()).tolist() == expected
    everywhere = {"attention_mask": torch.ones(3, 6).long()}  # padded by hand, unmasked
    assert real_text_tokens(pairs() | everywhere).tolist() == expected


def test_what_is_not_real_has_no_influence() -> None:
    real = real_text_tokens(pairs())
    other = pairs()
    other["input_ids"] = other["input_ids"].masked_fill(~real, 30)
    torch.testing.assert_close(
        CLIP.text_features(clip(), other), CLIP.text_features(clip(), pairs())
    )


def test_an_end_token_of_2_means_the_highest_id_as_in_transformers() -> None:
    ids = torch.tensor([[1, 7, 8, 44, 0, 0], [1, 44, 0, 0, 0, 0], [1, 7, 8, 9, 10, 44]])
    mask = (ids != 0).long()
    batch = images() | {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(real_text_tokens(batch, end=2), mask.bool())
    with torch.no_grad():
        expected = clip(end=2)(**batch).text_embeds
    torch.testing.assert_close(CLIP.text_features(clip(end=2), batch), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": None}, "no attention_mask .*padding=True"),
        ({"input_ids": None}, "no input_ids"),
        ({"input_ids": torch.full((3, 6), 5)}, r"text 0 .* has no end token \(id 49\)"),
        (
            {"attention_mask": torch.tensor([[1] * 6, [1, 1] + [0] * 4, [1] * 6])},
            "text 1 .* no end",
        ),
        ({"attention_mask": torch.tensor([[0] + [1] * 5] * 3)}, "starts with padding"),
        ({"input_ids": torch.full((3, 13), END), "attention_mask": torch.ones(3, 13)}, "13 tokens"),
        ({"attention_mask": torch.ones(3, 5)}, r"\[3, 6\] and attention_mask \[3, 5\]"),
        ({"pixel_values": torch.zeros(2, 3, 16, 16)}, "2 images and 3 texts"),
        ({"pixel_values": None}, "no pixel_values"),
    ],
)
def test_batches_that_do_not_fit_are_refused(change, message) -> None:
    with pytest.raises(BatchError, match=message):
        CLIP.streams(clip(), pairs() | change)


# --- streams, features, losses ---


@torch.no_grad()
@pytest.mark.parametrize("size", [16, 24])
def test_streams_and_features_are_those_of_the_model(size: int) -> None:
    model, batch = clip(), pairs() | images(size)
    found = {stream.name: stream.run() for stream in CLIP.streams(model, batch)}
    expected = model(**batch, interpolate_pos_encoding=size != 16)
    for name, output in (
        ("vision", expected.vision_model_output),
        ("text", expected.text_model_output),
    ):
        assert torch.equal(found[name].last_hidden_state, output.last_hidden_state)
    torch.testing.assert_close(CLIP.image_features(model, batch), expected.image_embeds)
    torch.testing.assert_close(CLIP.text_features(model, batch), expected.text_embeds)


@torch.no_grad()
def test_single_towers_run_and_those_with_a_projection_have_features() -> None:
    config = clip_config()
    vision = made(CLIPVisionModelWithProjection, config.vision_config)
    (stream,) = CLIP.streams(vision, images())
    assert stream.name == "vision"
    embeds = functional.normalize(vision(**images()).image_embeds, dim=-1)
    torch.testing.assert_close(CLIP.image_features(vision, images()), embeds)
    text = made(CLIPTextModelWithProjection, config.text_config)
    (stream,) = CLIP.streams(text, texts())
    assert stream.name == "text"
    embeds = functional.normalize(text(**texts()).text_embeds, dim=-1)
    torch.testing.assert_close(CLIP.text_features(text, texts()), embeds)
    with pytest.raises(UnsupportedError, match="has no text tower; load the CLIP model"):
        CLIP.text_features(vision, pairs())
    with pytest.raises(UnsupportedError, match="no visual_projection"):
        CLIP.image_features(CLIPVisionModel(config.vision_config), images())


def test_the_loss_is_that_of_the_model_and_reaches_every_prunable_weight() -> None:
    model, batch = clip(), pairs()
    (loss,) = CLIP.losses(model, batch).values()
    torch.testing.assert_close(loss, model(**batch, return_loss=True).loss)
    loss.backward()
    for name, weight in WeightMap.of(model, CLIP).items():
        assert weight.parameter.grad is not None, name
        assert weight.parameter.grad.abs().sum() > 0, name


def test_the_loss_of_a_classifier_is_its_cross_entropy() -> None:
    model = made(CLIPForImageClassification, clip_config())
    batch = images() | {"labels": torch.tensor([0, 1, 1])}
    torch.testing.assert_close(CLIP.losses(model, batch), {"ce": model(**batch).loss})
    with pytest.raises(BatchError, match="no labels"):
        CLIP.losses(model, images())


def test_what_has_no_loss_says_so() -> None:
    with pytest.raises(UnsupportedError, match="CLIPTextModel is one tower and has no loss"):
        CLIP.losses(CLIPTextModel(clip_config().text_config), texts())
    with pytest.raises(BatchError, match="the contrastive loss .* only 1 pair"):
        CLIP.losses(clip(), {name: value[:1] for name, value in pairs().items()})


# --- as a whole ---


def test_its_own_tokenizer_pads_with_the_end_token_and_ends_what_it_cuts() -> None:
    words = ["<|startoftext|>", *(f"{letter}</w>" for letter in "abcde"), "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=5)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    photos = [Image.new("RGB", (20, 16))] * 2
    batch = CLIP.collate(CLIPProcessor(images, tokenizer), photos, ["a b c d e", "a"])
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 6], [0, 1, 6, 6, 6]]
    assert real_text_tokens(batch, end=6).tolist() == [[True] * 5, [True] * 3 + [False] * 2]


def test_retrieval_ranks_by_the_logits_of_the_model() -> None:
    model = clip()
    with torch.no_grad():
        expected = recall_at_k(model(**pairs()).logits_per_image, ks=[1, 2])
    assert retrieval(model, CLIP, [pairs()], ks=[1, 2]).final == expected


@pytest.mark.parametrize("method", ["multiflow", "snip"])
def test_a_saved_model_is_loaded_claimed_and_pruned(tmp_path: Path, method: str) -> None:
    clip().save_pretrained(tmp_path)
    model, adapter = load_model(str(tmp_path), device="cpu")
    assert (type(model), adapter.name) == (CLIPModel, "clip")
    weights = WeightMap.of(model, adapter)
    masks = prune(model, [pairs(), pairs()], method=method, sparsity=0.5)
    assert masks.removed == weights.numel // 2
    masks.apply(model)
    assert masks.verify(model) == []


def test_the_statistics_of_text_layers_count_real_tokens_only() -> None:
    """Sums of squared inputs per text, against a loop over the texts without their padding."""
    model, batch = clip(), pairs()
    statistics = gather(model, [batch], adapter=CLIP)
    inputs: list[Tensor] = []
    layer = model.text_model.encoder.layers[0].mlp.fc1
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for row, length in zip(batch["input_ids"], (6, 3, 4), strict=True):
        model.text_model(input_ids=row[None, :length])
    handle.remove()
    tokens = torch.cat([read[0] for read in inputs])
    assert len(tokens) == 13
    found = statistics.mean("input_second_moment", "text.0.ffn.fc1")
    torch.testing.assert_close(found.float(), tokens.square().sum(dim=0) / 3)


def test_interpolated_positions_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    inputs._say_resized.cache_clear()
    model = clip()
    for size in (16, 24, 24):
        CLIP.image_features(model, pairs() | images(size))
    assert len(caplog.messages) == 1
    assert "images of 24 x 24 pixels, but the model is for 16 x 16" in caplog.text
