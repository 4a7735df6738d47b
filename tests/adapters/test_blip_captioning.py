"""BLIP's captioning model from end to end: masks of the pre-training model, pruning, captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from blip_transformers_examples import (
    ADAPTER,
    DEC,
    SEP,
    downstream,
    pairs,
    text_config,
    vision_config,
)
from torch import Tensor
from transformers import BertTokenizer, BlipForConditionalGeneration

from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig
from vlp_plugins.loading import load_model
from vlp_plugins.masks.masks import Masks
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.pruning import gather, prune
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.tasks.captioning import write_captions
from vlp_plugins.tasks.retrieval import retrieval


def captioning() -> BlipForConditionalGeneration:
    return downstream(BlipForConditionalGeneration)


def pretrained() -> BlipForPretraining:
    sizes: dict[str, Any] = {"embed_dim": 8, "queue_size": 6, "dec_token_id": DEC}
    config = BlipPretrainConfig(
        vision_config=vision_config(), text_config=text_config(), enc_token_id=49, **sizes
    )
    torch.manual_seed(0)
    return BlipForPretraining(config).eval()


@pytest.mark.parametrize("method", ["multiflow", "snip", "itersnip"])
def test_it_is_pruned_by_its_own_data_and_loss(tmp_path: Path, method: str) -> None:
    captioning().save_pretrained(tmp_path)
    model, adapter = load_model(str(tmp_path), device="cpu")
    assert (type(model), adapter.name) == (BlipForConditionalGeneration, "blip")
    weights = WeightMap.of(model, adapter)
    masks = prune(model, [pairs(), pairs()], method=method, sparsity=0.5)
    assert set(masks) == set(weights)
    assert masks.removed == weights.numel // 2
    masks.apply(model)
    assert masks.verify(model) == []
    assert all(torch.isfinite(loss) for loss in adapter.losses(model, pairs()).values())


def test_snip_ranks_by_the_gradient_of_the_captioning_loss() -> None:
    model = captioning()
    masks = prune(model, [pairs()], method="snip", sparsity=0.5)
    sum(ADAPTER.losses(model, pairs()).values()).backward()
    weights = WeightMap.of(model, ADAPTER)
    scores = {n: (w.parameter * w.parameter.grad).abs().detach() for n, w in weights.items()}
    kept = torch.cat([scores[name][masks[name]] for name in weights])
    removed = torch.cat([scores[name][~masks[name]] for name in weights])
    assert removed.max() <= kept.min() * (1 + 1e-5)


def test_the_data_pass_reads_images_in_cross_attention_and_words_elsewhere() -> None:
    """Sums of squared inputs per pair: every image token, and text without its padding."""
    model, batch = captioning(), pairs()
    statistics = gather(model, [batch], adapter=ADAPTER)
    read: dict[str, Tensor] = {}
    layer = model.text_decoder.bert.encoder.layer[1]
    modules = {"cross.key": layer.crossattention.self.key, "ffn.fc1": layer.intermediate.dense}
    handles = [
        module.register_forward_pre_hook(lambda _, args, part=part: read.update({part: args[0]}))
        for part, module in modules.items()
    ]
    ids = batch["input_ids"].clone()
    ids[:, 0] = DEC
    with torch.no_grad():
        model(**(batch | {"input_ids": ids}))
    for handle in handles:
        handle.remove()
    real = {"cross.key": torch.ones(3, 5).bool(), "ffn.fc1": batch["attention_mask"].bool()}
    for part, inputs in read.items():
        expected = inputs[real[part]].square().sum(dim=0) / 3
        found = statistics.mean("input_second_moment", f"text.1.{part}").float()
        torch.testing.assert_close(found, expected)


def test_masks_of_the_pretraining_model_fit_it_from_the_disk(tmp_path: Path) -> None:
    prune(pretrained(), [pairs()], sparsity=0.5).save(tmp_path / "masks.safetensors")
    masks, model = Masks.load(tmp_path / "masks.safetensors"), captioning()
    masks.apply(model)
    assert masks.verify(model) == []
    for name, weight in WeightMap.of(model, ADAPTER).items():
        assert torch.equal(weight.parameter != 0, masks[name]), name


def test_it_writes_captions_and_is_not_measured_by_retrieval() -> None:
    model = captioning()
    words = ["[PAD]", "[UNK]", "[SEP]", "[CLS]", "[MASK]", *(f"w{i}" for i in range(5, 50))]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    images = [{"pixel_values": pairs()["pixel_values"]}]
    captions = write_captions(model, ADAPTER, images, tokenizer, max_length=5)
    ids = ADAPTER.caption(model, pairs(), max_length=5)
    assert captions == [t.strip() for t in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert len(captions) == 3
    assert words.index("[SEP]") == SEP
    with pytest.raises(UnsupportedError, match="BlipForConditionalGeneration has no common space"):
        retrieval(model, ADAPTER, [pairs()])
