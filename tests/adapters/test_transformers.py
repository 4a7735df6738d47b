"""The adapter of all other models of transformers: names, what it leaves out, loss, wrappers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlavaModel

import vlp_plugins as vlp
from vlp_adapters.transformers import TransformersAdapter
from vlp_plugins.masks.sparse import load_sparse, save_sparse
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import BatchError, StatisticsError, UnsupportedError

sys.path.append(str(Path(__file__).parents[1] / "contract"))

from families import FAMILIES

LLAVA = FAMILIES["llava"]


def llava() -> nn.Module:
    torch.manual_seed(0)
    return LLAVA.model().eval()


def reasons(model: nn.Module, adapter: TransformersAdapter | None = None) -> dict[str, str]:
    """By path of a parameter why it is not pruned."""
    adapter = adapter or TransformersAdapter()
    prunable = {alias for w in WeightMap.of(model, adapter).values() for alias in w.aliases}
    rules = list(adapter.exclusions(model))
    return {
        path: next(rule.reason for rule in rules if re.search(rule.pattern, path))
        for path, _ in model.named_parameters()
        if path not in prunable
    }


def test_masks_of_the_bare_model_fit_the_one_that_writes_and_both_in_peft() -> None:
    whole = llava()
    bare = LlavaModel(whole.config).eval()
    bare.load_state_dict(whole.model.state_dict())
    masks = vlp.prune(bare, method="omp", sparsity=0.5)
    tuned = get_peft_model(llava(), LoraConfig(r=2, target_modules=["q_proj", "linear_1"]))
    for model in (whole, tuned):
        assert masks.verify(model) != []
        masks.apply(model)
        assert masks.verify(model) == []
        assert list(WeightMap.of(model, TransformersAdapter())) == list(masks.manifest.weights)
    added = [path for path in reasons(tuned) if "lora_" in path]
    assert added
    assert {reasons(tuned)[path] for path in added} == {"added by PEFT to the layer that is pruned"}


def test_peft_models_are_calibrated_like_their_base_model() -> None:
    batches = [LLAVA.batch("left")]
    torch.manual_seed(1)
    tuned = get_peft_model(llava(), LoraConfig(r=2, target_modules=["q_proj"]))
    for method in ("wanda", "snip"):
        mine = vlp.prune(tuned, batches, method=method, sparsity=0.5)
        theirs = vlp.prune(llava(), batches, method=method, sparsity=0.5)
        assert mine.compare(theirs)["all"].agreement == 1


def test_wrapped_models_are_pruned_as_they_are() -> None:
    batches = [LLAVA.batch("right")]
    model = llava()
    plain = vlp.prune(model, batches, method="wanda", sparsity=0.5)
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        masks = vlp.prune(wrapped, batches, method="wanda", sparsity=0.5)
        assert masks.compare(plain)["all"].agreement == 1


def test_what_is_left_out_is_named_and_can_be_changed() -> None:
    model = llava()
    found = reasons(model)
    assert found["lm_head.weight"] == "output embedding: the head over the vocabulary"
    last = "model.vision_tower.encoder.layers.2.mlp.fc1.weight"
    assert found[last].startswith("vision layer behind vision_feature_layer")
    assert found["model.vision_tower.embeddings.patch_embedding.weight"].startswith("embeddings")
    adapter = TransformersAdapter(include=["lm_head"], exclude=["projector"])
    found = reasons(model, adapter)
    assert "lm_head.weight" not in found
    assert found["model.multi_modal_projector.linear_1.weight"] == (
        "excluded on request (projector)"
    )
    with pytest.raises(UnsupportedError, match=r"include: '\(' is not a regular expression"):
        TransformersAdapter(include="(")
    for wrong in (3, [3]):
        with pytest.raises(UnsupportedError, match="exclude=.* should be a regular expression"):
            TransformersAdapter(exclude=wrong)  # type: ignore[arg-type]


def test_masks_remember_what_was_included(tmp_path: Path) -> None:
    model = llava()
    adapter = TransformersAdapter(include=["lm_head"], exclude=["projector"])
    vlp.prune(model, [LLAVA.batch("right")], adapter=adapter, method="wanda", sparsity=0.5).save(
        tmp_path / "masks.safetensors"
    )
    masks = vlp.Masks.load(tmp_path / "masks.safetensors")
    masks.apply(model)
    assert "lm_head" in masks.manifest.weights
    assert masks.verify(model) == []


def test_masks_know_how_large_the_model_is() -> None:
    model = llava()
    masks = vlp.prune(model, method="omp", sparsity=0.5)
    assert masks.manifest.model_elements == sum(p.numel() for p in model.parameters())
    assert masks.model_sparsity == masks.removed / masks.manifest.model_elements < 0.5


def test_the_loss_is_that_of_the_words_of_the_batch() -> None:
    model, batch = llava(), LLAVA.batch("left")
    (loss,) = TransformersAdapter().losses(model, batch).values()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    words = ((mask != 0) & (ids != 90))[:, 1:].flatten()
    by_hand = nn.functional.cross_entropy(logits[words], ids[:, 1:].flatten()[words])
    torch.testing.assert_close(loss, by_hand)
    labels = ids.masked_fill(ids != ids[0, -1], -100)
    (given,) = TransformersAdapter().losses(model, batch | {"labels": labels}).values()
    assert not torch.equal(given, loss)


def test_a_batch_without_a_mask_is_refused() -> None:
    batch = LLAVA.batch("right")
    del batch["attention_mask"]
    with pytest.raises(BatchError, match="no attention_mask"):
        vlp.prune(llava(), [batch], method="wanda", sparsity=0.5)


def test_all_that_no_batch_reaches_is_named_at_once() -> None:
    batch = {k: v for k, v in LLAVA.batch("right").items() if k != "pixel_values"}
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == 90, 5)
    with pytest.raises(StatisticsError) as error:
        vlp.prune(llava(), [batch], method="wanda", sparsity=0.5)
    for layer in ("model.vision_tower.encoder.layers.*.mlp.fc1", "multi_modal_projector.linear_1"):
        assert layer in str(error.value)


def one_by_one(batch: dict[str, torch.Tensor], images: list[int]) -> list[dict[str, torch.Tensor]]:
    """The samples of a packed batch without padding, each a batch of its own."""
    patches = batch["image_grid_thw"].prod(1).split(images)
    pixels = batch["pixel_values"].split([int(found.sum()) for found in patches])
    grids = batch["image_grid_thw"].split(images)
    alone = []
    for row, count in enumerate(images):
        real = batch["attention_mask"][row] == 1
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
        sample = {name: batch[name][row][real].unsqueeze(0) for name in names}
        shown = {"pixel_values": pixels[row], "image_grid_thw": grids[row]} if count else {}
        alone.append(sample | shown)
    return alone


def test_points_of_packed_patches_are_those_of_each_sample_alone() -> None:
    torch.manual_seed(0)
    family = FAMILIES["qwen2_5_vl"]
    model = family.model().eval()
    together, alone = [], []
    for seed in range(24):
        batch = family.batch("right")
        random = torch.Generator().manual_seed(seed)
        batch["pixel_values"] = torch.randn(batch["pixel_values"].shape, generator=random)
        words = torch.randint(10, 60, batch["input_ids"].shape, generator=random)
        ids = batch["input_ids"]
        batch["input_ids"] = torch.where((ids > 5) & (ids < 60), words, ids)
        together.append(batch)
        alone += one_by_one(batch, [2, 1, 0])
    first, second = (vlp.measure_id(model, batches).layers for batches in (together, alone))
    assert {layer.modality: layer.points for layer in first} == {"vision": 48, "text": 72}
    for one, other in zip(first, second, strict=True):
        assert (one.weight, one.points) == (other.weight, other.points)
        assert one.dimension == pytest.approx(other.dimension, rel=1e-3), one.weight


def test_it_is_asked_after_the_adapters_of_families() -> None:
    for name, adapter in (("siglip2", "siglip"), ("dinov2", "transformers")):
        assert registry().adapter_for(FAMILIES[name].model()).name == adapter


def seen_moments(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By weight the sum of the squares of what entered it."""
    sums = vlp.gather(model, [batch], method="wanda").sums
    return {site.weight: torch.as_tensor(value).sum(0) for (_, site), value in sums.items()}


def test_an_expert_reads_the_real_tokens_that_are_routed_to_it() -> None:
    torch.manual_seed(0)
    family = FAMILIES["qwen3_vl_moe"]
    model, batch = family.model().eval(), family.batch("left")
    experts = model.model.language_model.layers[0].mlp.experts
    nn.init.normal_(model.model.language_model.layers[0].mlp.gate.weight)
    called = []
    handle = experts.register_forward_pre_hook(lambda _, args: called.append(args))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    hidden, routes, _ = called[0]
    real = batch["attention_mask"].flatten() == 1
    found = seen_moments(model, batch)
    name = "language_model.layers.0.mlp.experts"
    tokens = 0
    for expert in range(4):
        first, second = torch.zeros(16), torch.zeros(8)
        for place in range(len(hidden)):
            if real[place] and expert in routes[place]:
                tokens += 1
                first += hidden[place] ** 2
                gate, up = (experts.gate_up_proj[expert] @ hidden[place]).chunk(2)
                second += ((nn.functional.silu(gate) * up) ** 2).detach()
        torch.testing.assert_close(found[f"{name}.gate_up_proj.{expert}"].float(), first)
        torch.testing.assert_close(found[f"{name}.down_proj.{expert}"].float(), second)
    assert tokens == 2 * int(real.sum())


def test_attention_of_torch_is_three_projections_and_an_output() -> None:
    torch.manual_seed(0)
    family = FAMILIES["bridgetower"]
    model, batch = family.model().eval(), family.batch("right")
    attention = model.bridgetower.vision_model.visual.transformer.resblocks[0].attn
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]):
        inputs.append(args[0])
        outputs.append(output[0])

    handle = attention.register_forward_hook(keep)
    with torch.no_grad():
        model(**batch)
    handle.remove()
    found = seen_moments(model, batch)
    name = "vision_model.visual.transformer.resblocks.0.attn"
    for part in ("query", "key", "value"):
        moments = found[f"{name}.in_proj_weight.{part}"].float()
        torch.testing.assert_close(moments, (inputs[0] ** 2).sum((0, 1)))
    # What enters the last projection is what makes the output.
    projection = attention.out_proj
    entered = torch.linalg.solve(projection.weight, (outputs[0] - projection.bias).mT).mT
    torch.testing.assert_close(
        found[f"{name}.out_proj"].float(), (entered**2).sum((0, 1)).detach(), rtol=1e-3, atol=1e-5
    )


def test_a_transposed_matrix_is_pruned_by_its_outputs() -> None:
    torch.manual_seed(0)
    family = FAMILIES["vit_gpt2"]
    model = family.model().eval()
    vlp.prune(model, [family.batch("right")], method="wanda", sparsity=0.5).apply(model)
    layer = model.decoder.transformer.h[0].attn.c_attn  # stores [in, out]
    assert ((layer.weight == 0).sum(0) == 8).all()


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "aria", "llama4", "vit_gpt2", "bridgetower"])
def test_every_matrix_is_a_weight(name: str) -> None:
    model = FAMILIES[name].model()
    rules = TransformersAdapter().exclusions(model)
    assert [rule.reason for rule in rules if not rule.by_design] == []


def test_parts_of_parameters_stay_zero_in_training_and_in_a_sparse_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    family = FAMILIES["aria"]
    model, batch = family.model(), family.batch("right")
    masks = vlp.prune(model, [batch], method="snip", sparsity=0.5)
    masks.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with vlp.SparsityLock(model, masks).attach(optimizer) as lock:
        for _ in range(2):
            (loss,) = TransformersAdapter().losses(model, batch).values()
            loss.backward()
            gradient = model.model.language_model.layers[0].mlp.experts.gate_up_proj.grad
            kept = masks["language_model.layers.0.mlp.experts.gate_up_proj.1"]
            assert not gradient[1].T[~kept].any()
            optimizer.step()
        assert lock.violations() == []
    save_sparse(model, tmp_path / "sparse", masks=masks)
    again, _ = load_sparse(tmp_path / "sparse")
    assert masks.verify(again) == []
    for first, second in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("method", ["itersnip", "tamt", "platon", "chita", "sparsegpt"])
def test_parts_of_parameters_are_put_back_and_pruned_by_every_kind_of_method(method: str) -> None:
    torch.manual_seed(0)
    family = FAMILIES["qwen3_vl_moe"]
    model = family.model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = vlp.prune(model, [family.batch("right")] * 4, method=method, sparsity=0.5)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    masks.apply(model)
    assert masks.verify(model) == []
