"""Cut models on the disk: loaded in another process they are the same, and damage is told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from structured_examples import MAKERS, prepared, random_record
from torch import nn

from vlp_plugins.loading import load_model, load_structure
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.saving import check_can_save
from vlp_plugins.runtime.errors import (
    OutputError,
    StructureError,
    UnknownNameError,
    UnsupportedError,
)
from vlp_plugins.structured.check import check_equal, example_batch, outputs
from vlp_plugins.structured.cuts import cut, patch
from vlp_plugins.structured.files import is_structured, read_record, rebuild, save_structured
from vlp_plugins.structured.record import Kept, Record
from vlp_plugins.structured.survey import blocks_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cut retrieval model on the disk."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    model, adapter = prepared("blip retrieval")
    record = random_record(model, adapter)
    cut(model, adapter, record)
    save_structured(model, folder, record, adapter=adapter)
    return folder


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of it that may be damaged."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_every_model_is_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    expected = {}
    for name in MAKERS:
        folder = tmp_path / name
        model, adapter = prepared(name)
        batch = example_batch(model, adapter)
        record = random_record(model, adapter)
        cut(model, adapter, record)
        save_structured(model, folder / "model", record)
        save_file(dict(batch), folder / "batch.safetensors")
        expected[folder] = outputs(model, adapter, batch)
    program = Path(__file__).with_name("rebuild_run.py")
    command = [sys.executable, str(program), *map(str, expected)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    for folder, wanted in expected.items():
        check_equal(wanted, load_file(folder / "outputs.safetensors"), 1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_parameters_buffers_and_ties_return(name: str, tmp_path: Path) -> None:
    model, adapter = prepared(name)
    record = random_record(model, adapter)
    cut(model, adapter, record)
    for _, buffer in model.named_buffers():  # also those that no state_dict has
        if buffer.is_floating_point():
            buffer.add_(0.5)
    save_structured(model, tmp_path / "model", record, adapter=adapter)
    again, found = rebuild(tmp_path / "model")
    assert found.name == adapter.name
    assert not again.training
    for kind in ("named_parameters", "named_buffers"):
        old = dict(getattr(model, kind)(remove_duplicate=False))
        new = dict(getattr(again, kind)(remove_duplicate=False))
        assert old.keys() == new.keys()
        assert all(torch.equal(old[path], new[path]) for path in old)
        assert _groups(old) == _groups(new)
    frozen = {path for path, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {path for path, p in again.named_parameters() if not p.requires_grad}
    assert blocks_of(model, adapter) == blocks_of(again, found)
    assert dict(read_record(tmp_path / "model")) == dict(record)
    assert read_record(tmp_path / "model").adapter == adapter.name


def _groups(tensors: dict[str, torch.Tensor]) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for path, tensor in tensors.items():
        groups.setdefault(id(tensor), set()).add(path)
    return {frozenset(group) for group in groups.values()}


def test_a_rebuilt_model_can_be_cut_and_saved_again(folder: Path, tmp_path: Path) -> None:
    model, adapter = rebuild(folder)
    second = random_record(model, adapter, seed=3)
    cut(model, adapter, second)
    with pytest.raises(StructureError, match=r"Record\.compose"):
        save_structured(model, tmp_path / "wrong", second)
    assert not (tmp_path / "wrong").exists()
    save_structured(model, tmp_path / "right", read_record(folder).compose(second))
    again, _ = rebuild(tmp_path / "right")
    batch = example_batch(model, adapter)
    check_equal(outputs(model, adapter, batch), outputs(again, adapter, batch), 1e-6)


def test_a_model_of_bfloat16_stays_one(tmp_path: Path) -> None:
    model, adapter = prepared("clip")
    record = random_record(model, adapter)
    cut(model.bfloat16(), adapter, record)
    save_structured(model, tmp_path / "model", record)
    again, _ = rebuild(tmp_path / "model")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    for dtype, expected in {"auto": torch.bfloat16, "float32": torch.float32}.items():
        loaded, _ = load_model(str(tmp_path / "model"), dtype=dtype, device="cpu")
        assert {parameter.dtype for parameter in loaded.parameters()} == {expected}


def test_loading_knows_such_a_folder(folder: Path) -> None:
    assert is_structured(folder)
    assert not is_structured(folder.parent)
    wanted, _ = rebuild(folder)
    for load in (load_model, load_structure):
        model, adapter = load(str(folder))
        assert adapter.name == "blip"
        sizes = [p.shape for p in model.parameters()]
        assert sizes == [p.shape for p in wanted.parameters()]
    _, other = load_model(str(folder), adapter="module", device="cpu")
    assert isinstance(other, ModuleAdapter)


def test_the_adapter_of_any_module(tmp_path: Path) -> None:
    model, _ = prepared("vit")
    adapter = ModuleAdapter(model, modalities={"layers": "image"}, exclude="layers.0.mlp")
    names = [block.name for block in blocks_of(model, adapter)]
    assert names == ["layers.0.attention", "layers.1.attention", "layers.1.mlp"]
    record = Record({"layers.1.mlp": Kept(units=(1, 2)), "layers.0.attention": Kept(heads=(3,))})
    cut(model, adapter, record)
    save_structured(model, tmp_path / "model", record, adapter=adapter)
    again, found = rebuild(tmp_path / "model")
    assert found.settings() == adapter.settings()
    batch = example_batch(model, adapter)
    check_equal(outputs(model, adapter, batch), outputs(again, found, batch), 1e-6)


def test_tokenizer_files_come_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer_config.json").write_text("{}")
    model, adapter = prepared("vit")
    save_structured(model, tmp_path / "model", Record(), adapter=adapter, source=str(source))
    assert (tmp_path / "model" / "tokenizer_config.json").is_file()
    with pytest.raises(OutputError, match="not empty"):
        save_structured(model, tmp_path / "model", Record(), adapter=adapter)


def test_options_of_generation_come_along(tmp_path: Path) -> None:
    model, adapter = prepared("blip captioning")
    model.generation_config.max_new_tokens = 7
    save_structured(model, tmp_path / "model", Record(), adapter=adapter, history=[["by", "hand"]])
    again, _ = rebuild(tmp_path / "model")
    assert again.generation_config.max_new_tokens == 7
    said = json.loads((tmp_path / "model" / "vlp_structure.json").read_text())
    assert said["history"] == [["by", "hand"]]
    assert said["made_by"].startswith("vlp_plugins ")


def test_save_pretrained_of_a_cut_model_is_refused_where_we_call_it() -> None:
    model, adapter = prepared("clip")
    check_can_save(model)
    cut(model, adapter, Record({"vision.0.mlp": Kept(units=(0,))}))
    with pytest.raises(UnsupportedError, match="save_structured"):
        check_can_save(model)
    split, _ = prepared("blip retrieval")  # from_pretrained would draw query, key and value
    with pytest.raises(UnsupportedError, match="projections split"):
        check_can_save(split)
    other, _ = prepared("vit")
    for block in blocks_of(other, adapter := ModuleAdapter(other)):
        if block.kind == "attention":
            for part in block.inner:
                linear = other.get_submodule(part.path)
                linear.weight = nn.Parameter(linear.weight.detach()[:4])
                linear.bias, linear.out_features = nn.Parameter(linear.bias.detach()[:4]), 4
            output = other.get_submodule(block.output.path)
            output.weight = nn.Parameter(output.weight.detach()[:, :4])
            output.in_features = 4
    patch(other, adapter, {f"layers.{i}.attention": 1 for i in range(2)})
    with pytest.raises(UnsupportedError, match="save_structured"):
        check_can_save(other)


def test_a_model_that_cannot_be_made_anew_is_not_written(tmp_path: Path) -> None:
    class Mine(type(prepared("vit")[0])):  # type: ignore[misc]
        """A class that transformers does not know."""

    model, adapter = prepared("vit")
    mine = Mine(model.config)
    with pytest.raises(UnsupportedError, match="makes a ViTModel, but the pruned model is a Mine"):
        save_structured(mine, tmp_path / "mine", Record(), adapter=adapter)
    with pytest.raises(UnsupportedError, match="no configuration"):
        save_structured(nn.Linear(2, 2), tmp_path / "mine", Record(), adapter=adapter)
    assert not (tmp_path / "mine").exists()


def _edit(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "vlp_structure.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _truncate(name: str) -> Callable[[Path], None]:
    def truncate(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return truncate


def _flip(folder: Path) -> None:
    path = folder / "vlp_structured.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))


def _other_config(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["hidden_size"] = 32
    path.write_text(json.dumps(config))


def _shallow(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["num_hidden_layers"] = 3
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "vlp_structure.json").unlink(), StructureError, "not a folder of save_s"),
        (lambda f: (f / "vlp_structured.safetensors").unlink(), StructureError, "is not a file"),
        (lambda f: (f / "config.json").unlink(), UnsupportedError, "cannot make a model"),
        (_truncate("vlp_structure.json"), StructureError, "is damaged"),
        (_truncate("vlp_structured.safetensors"), StructureError, "damaged, truncated"),
        (_truncate("config.json"), UnsupportedError, "cannot make a model"),
        (_flip, StructureError, "the checksum differs"),
        (_edit(schema=2, made_by="vlp_plugins 9"), StructureError, "vlp_plugins 9: upgrade"),
        (_edit(schema="1"), StructureError, "is damaged"),
        (_edit(record=[1]), StructureError, "a record is a mapping"),
        (_edit(record={"vision.9.mlp": {"units": [0]}}), StructureError, "no block 'vision.9.mlp'"),
        (_edit(record={}), StructureError, "configuration and record make it"),
        (_edit(adapter="blop"), UnknownNameError, "did you mean 'blip'"),
        (_edit(adapter="module", settings={"x": 1}), UnsupportedError, "has these settings"),
        (_edit(adapter=3), StructureError, "should be names"),
        (_edit(model="BlipModel"), UnsupportedError, "but the pruned model is a BlipModel"),
        (_other_config, StructureError, "configuration and record make it"),
        (_shallow, StructureError, "lacks"),
    ],
)
def test_damaged_and_foreign_folders_are_told(
    copied: Path, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    damage(copied)
    with pytest.raises(error, match=message):
        rebuild(copied)


def test_transformers_does_not_load_it_by_mistake(folder: Path) -> None:
    """`from_pretrained` must fail, not draw what it does not find."""
    from transformers import BlipForImageTextRetrieval

    with pytest.raises(OSError, match="no file named"):
        BlipForImageTextRetrieval.from_pretrained(folder)


def test_a_record_of_other_heads_of_the_same_width_is_refused(copied: Path) -> None:
    path = copied / "vlp_structure.json"
    content = json.loads(path.read_text())
    for kept in content["record"].values():
        if kept.get("heads") is not None:
            others = [head for head in range(4) if head not in kept["heads"]]
            kept["heads"][-1] = others[-1] if others else kept["heads"][-1]
            kept["heads"].sort()
    changed = json.dumps(content)
    assert changed != json.dumps(json.loads(path.read_text()))
    path.write_text(changed)

    with pytest.raises(StructureError, match="written with another"):
        rebuild(copied)
