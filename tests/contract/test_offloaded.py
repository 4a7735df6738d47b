"""Models that accelerate has offloaded, to RAM or to disk: the results are those of the model."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import accelerate
import chat_models
import pytest
import torch
from equal_values import same
from families import FAMILIES
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

import vlp_plugins as vlp
from benchmarks.parity.blip import batches_from_golden, model_from_golden
from vlp_plugins.masks.sparse import load_sparse, save_sparse
from vlp_plugins.models.discovery import registry
from vlp_plugins.models.inspection import inspect_model
from vlp_plugins.models.saving import write_model
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.errors import MaskError, OutputError, UnsupportedError
from vlp_plugins.runtime.offload import offloading
from vlp_plugins.structured.cuts import prepare
from vlp_plugins.tasks.captioning import generate
from vlp_plugins.tasks.finetuning.finetune import finetune
from vlp_plugins.tasks.sensitivity.measure import sensitivity

GOLDEN = Path(__file__).parents[1] / "golden" / "blip"
Offload = Callable[[nn.Module], nn.Module]


def device_map(model: nn.Module) -> dict[str, str]:
    """Every second of the layers that have no others within to disk."""
    found = {}
    holders = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    for number, path in enumerate(dict.fromkeys(path.rpartition(".")[0] for path, _ in holders)):
        module = model.get_submodule(path)
        if not list(module.children()):
            found[path] = "disk" if number % 2 else "cpu"
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found |= {f"{path}.{name}".strip("."): "cpu" for name, _ in own}
    return found


@pytest.fixture(params=["RAM", "disk", "device map"])
def offload(request: pytest.FixtureRequest, tmp_path: Path) -> Offload:
    """What makes an offloaded copy of a model."""
    logging.getLogger("accelerate").setLevel(logging.ERROR)

    def made(model: nn.Module) -> nn.Module:
        there = deepcopy(model)
        if request.param == "RAM":
            accelerate.cpu_offload(there, execution_device="cpu")
        elif request.param == "disk":
            accelerate.disk_offload(there, tmp_path / "away", execution_device="cpu")
        else:
            accelerate.dispatch_model(
                there, device_map(there), main_device="cpu", offload_dir=tmp_path / "away"
            )
        return there

    return made


def tied_llava() -> nn.Module:
    return chat_models.llava(tie_word_embeddings=True)


def talks(count: int = 2, rows: int = 2) -> list[dict[str, Tensor]]:
    """Batches of texts with an image of 16 tokens each, the second text shorter."""
    random = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        ids = torch.randint(10, 200, (rows, 24), generator=random)
        ids[:, 2:18] = 3
        mask = torch.ones_like(ids)
        mask[1:, 21:] = 0
        labels = ids.masked_fill((ids == 3) | (mask == 0), -100)
        pixels = torch.randn(rows, 3, 32, 32, generator=random)
        batches.append(
            {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}
        )
    return batches


def flags(model: nn.Module) -> list[tuple[object, ...]]:
    """What is to be left as it was: where parameters are, what they are, hooks, modes."""
    return [
        *((p, t.device, t.dtype, t.requires_grad) for p, t in model.named_parameters()),
        *((p, m.training, len(m._forward_pre_hooks), len(m._forward_hooks))
          for p, m in model.named_modules()),
    ]  # fmt: skip


def filled(model: nn.Module) -> dict[str, Tensor]:
    """The values of every parameter, with accelerate's own means."""
    inside = deepcopy(model)
    accelerate.hooks.remove_hook_from_submodules(inside)
    return values(inside)


def values(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters(remove_duplicate=False)
    return {path: value.detach() for path, value in named}


def pruned(method: str, **options: Any) -> Any:
    return lambda model, data: vlp.prune(model, data, method=method, sparsity=0.5, **options)


def adapter_of(model: nn.Module) -> Any:
    return registry().adapter_for(model)


def inspected(model: nn.Module, data: Any) -> Any:
    found = inspect_model(model, adapter_of(model))
    return found.groups, found.excluded, found.parameters


ENTRIES: dict[str, Any] = {
    "omp": pruned("omp"),
    "wanda by blocks": pruned("wanda", walk="blocks"),
    "sparsegpt by blocks": pruned("sparsegpt", walk="blocks"),
    "chita by blocks": pruned("chita", walk="blocks"),
    "lamp": pruned("lamp"),
    "multiflow": pruned("multiflow"),
    "das": pruned("omp", allocation="das"),
    "ecoflap": pruned("omp", allocation="ecoflap"),
    "snip": pruned("snip"),
    "alps": pruned("alps"),
    "itersnip": pruned("itersnip", rounds=2),
    "chita": pruned("chita"),
    "tamt": pruned("tamt", steps=2),
    "gather": lambda model, data: vlp.gather(model, data).sums,
    "split half": lambda m, d: vlp.split_half(m, vlp.gather(m, d), sparsity=0.5),
    "measure_id": lambda model, data: vlp.measure_id(model, talks(1, 24)).layers,
    "sensitivity": lambda m, d: sensitivity(m, d, groups=["modality"], sparsity=[0.5]).curves,
    "inspect": inspected,
    "generate": lambda m, d: generate(
        m, {k: v[:1, :20] if k != "pixel_values" else v[:1] for k, v in d[0].items()}, max_length=4
    ),
}


@pytest.mark.parametrize("offload", ["RAM", "device map"], indirect=True)
@pytest.mark.parametrize("entry", ENTRIES)
def test_results_are_those_of_the_model_in_memory(entry: str, offload: Offload) -> None:
    model = tied_llava()
    there = offload(model)
    there(**talks()[0])  # transformers leaves hooks of its own in the first forward
    before = flags(there)

    expected = ENTRIES[entry](model, talks())
    found = ENTRIES[entry](there, talks())

    assert same(found, expected)
    assert flags(there) == before
    assert same(filled(there), values(model))


@pytest.mark.parametrize("offload", ["disk", "device map"], indirect=True)
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "florence2", "llama4"])
@pytest.mark.parametrize("method", ["multiflow", "snip"])
def test_ties_and_fused_experts_are_what_they_are(
    family: str, method: str, offload: Offload
) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family].model().eval()
    there, batches = offload(model), [FAMILIES[family].batch("right")] * 2

    masks = vlp.prune(model, batches, method=method, sparsity=0.5)
    assert vlp.prune(there, batches, method=method, sparsity=0.5) == masks
    masks.apply(model)
    masks.apply(there)
    assert masks.verify(there) == []
    assert same(filled(there), values(model))


@pytest.mark.parametrize("method", ["multiflow", "snip", "chita"])
def test_a_model_whose_losses_change_it(method: str, offload: Offload) -> None:
    """BLIP with momentum copies and queues, run in parts, its encoder and decoder tied."""
    model, batches = model_from_golden(GOLDEN), list(batches_from_golden(GOLDEN)[:2])
    there = offload(model)
    if method == "multiflow":
        assert pruned(method)(there, batches) == pruned(method)(model, batches)
        return
    with pytest.raises(UnsupportedError, match="momentum.*that accelerate has offloaded"):
        pruned(method)(there, batches)


def test_masks_new_values_and_files(offload: Offload, tmp_path: Path) -> None:
    model = tied_llava()
    there = offload(model)
    original = {file: file.read_bytes() for file in tmp_path.glob("away/*")}
    masks = vlp.prune(model, talks(), method="alps", sparsity=0.5)
    assert masks.new_values is not None

    assert len(masks.verify(there)) > 0
    masks.apply(model)
    masks.apply(there)
    assert masks.verify(there) == []
    with torch.no_grad():
        assert torch.equal(there(**talks()[0]).logits, model(**talks()[0]).logits)

    write_model(model, tmp_path / "dense")
    write_model(there, tmp_path / "offloaded")
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("dense", "offloaded"))
    assert same(one, other)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "offloaded")
    assert same(values(again), values(model))
    save_sparse(there, tmp_path / "sparse", masks=masks)
    loaded, _ = load_sparse(tmp_path / "sparse")
    assert same(values(loaded), values(model))
    for file, content in original.items():
        assert file.read_bytes() == content


def test_a_folder_of_photos_and_an_offloaded_chat_model(photos: Path, tmp_path: Path) -> None:
    folder = chat_models.save_llava(tmp_path / "llava")
    map_ = {"model.vision_tower": "cpu", "model.multi_modal_projector": "disk",
            "model.language_model": "disk", "lm_head": "disk"}  # fmt: skip
    models = [
        LlavaForConditionalGeneration.from_pretrained(folder, **options).eval()
        for options in ({}, {"device_map": map_, "offload_folder": tmp_path / "away"})
    ]
    assert models[1].lm_head.weight.is_meta
    made = [
        vlp.prune(each, vlp.batches(photos, each, batch_size=4), sparsity=0.5) for each in models
    ]
    assert made[0] == made[1]
    found = [vlp.evaluate(each, photos, task="captioning", limit=2, longest=4) for each in models]
    assert dict(found[0]) == dict(found[1])
    assert found[0].texts == found[1].texts


def test_changed_weights_on_disk_go_when_nothing_needs_them(tmp_path: Path) -> None:
    there = tied_llava()
    accelerate.disk_offload(there, tmp_path, execution_device="cpu")
    count = len(WeightMap.of(there, adapter_of(there)))
    masks = vlp.prune(there, method="omp", sparsity=0.5)
    for _ in range(2):  # a second change of a weight replaces the file of the first
        masks.apply(there)
        assert len(list(tmp_path.glob("vlp-*"))) == count
    copied = deepcopy(there)
    del there
    assert masks.verify(copied) == []
    del copied
    gc.collect()
    assert list(tmp_path.glob("vlp-*")) == []


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tied_llava()
    accelerate.disk_offload(there, tmp_path, execution_device="cpu")
    masks = vlp.prune(there, method="omp", sparsity=0.5)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("vlp_plugins.runtime.offload.save_file", full)
    with pytest.raises(OutputError, match=r"offloaded to disk cannot be written .*No space left"):
        masks.apply(there)
    assert list(tmp_path.glob("vlp-*")) == []


def test_a_checkpoint_is_not_written_to(tmp_path: Path) -> None:
    """transformers takes what a device map has on disk from the checkpoint itself."""
    tied_llava().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    there = LlavaForConditionalGeneration.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        device_map={"model.vision_tower": "cpu", "model.multi_modal_projector": "disk",
                    "model.language_model": "disk", "lm_head": "disk"},
        offload_folder=tmp_path / "away",
    )  # fmt: skip
    assert any(parameter.is_meta for parameter in there.parameters())
    for method in ("multiflow", "snip", "chita"):
        masks = pruned(method)(model, talks())
        assert pruned(method)(there, talks()) == masks
    masks.apply(there)
    masks.apply(model)
    assert masks.verify(there) == []
    with torch.no_grad():
        assert torch.equal(there(**talks()[0]).logits, model(**talks()[0]).logits)
    assert file.read_bytes() == content


def test_what_trains_or_cuts_refuses(offload: Offload) -> None:
    model = tied_llava()
    there = offload(model)
    adapter, masks = adapter_of(there), vlp.prune(model, method="omp", sparsity=0.5)
    for call in (
        lambda: vlp.SparsityLock(there, masks),
        lambda: vlp.GradualPruning(there, sparsity=0.5, steps=2),
        lambda: finetune(there, adapter, talks(), task="pretraining", masks=masks),
        lambda: prepare(there, adapter),
    ):
        with pytest.raises(UnsupportedError, match=r"accelerate has offloaded .* needs them in"):
            call()


def test_a_model_without_values_can_be_described_alone() -> None:
    with torch.device("meta"):
        empty = chat_models.llava()
    masks = vlp.prune(chat_models.llava(), method="omp", sparsity=0.5)
    assert inspected(empty, None) == inspected(chat_models.llava(), None)
    for call in (
        lambda: vlp.prune(empty, method="omp", sparsity=0.5),
        lambda: vlp.gather(empty, talks()),
        lambda: vlp.measure_id(empty, talks()),
        lambda: sensitivity(empty, talks()),
    ):
        with pytest.raises(UnsupportedError, match="meta device.*`inspect` and `plan` alone"):
            call()
    with pytest.raises(MaskError, match="meta device"):
        masks.apply(empty)


def test_values_kept_in_a_way_of_their_own_are_refused() -> None:
    there = tied_llava()
    accelerate.cpu_offload(there, execution_device="cpu")
    for module in there.modules():
        for hook in offloading(module):
            hook.weights_map = list(hook.weights_map)
    with pytest.raises(UnsupportedError, match="kept in a list, which is none of accelerate's"):
        vlp.prune(there, method="omp", sparsity=0.5)
