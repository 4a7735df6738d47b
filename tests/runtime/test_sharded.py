"""A model under fully_shard in two processes is pruned like the whole model in one."""

from __future__ import annotations

from pathlib import Path

import chat_models
import pytest
import torch
from sharded_runs import CHITA, GOLDEN, RUNS, WALKS, WAYS, Qwen, family_of
from two_processes import run_two_processes

from benchmarks.parity.family import Family
from vlp_plugins.masks.masks import Masks
from vlp_plugins.pruning import prune

SCRIPT = Path(__file__).with_name("sharded_runs.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two processes under torchrun left what they found."""
    folder = tmp_path_factory.mktemp("sharded")
    run_two_processes(SCRIPT, folder)
    return folder


def assert_same_masks(path: Path, expected: Masks) -> None:
    found = Masks.load(path)
    assert all(torch.equal(found.packed[name], bits) for name, bits in expected.packed.items())
    assert found.manifest.calibration == expected.manifest.calibration
    assert found.manifest.weights_hash == expected.manifest.weights_hash


def assert_as_in_one_process(folder: Path, names: list[str], kind: str, **options) -> None:
    family = family_of(kind)
    model = family.model()
    masks = prune(model, family.batches()[:3], sparsity=0.75, **options)
    masks.apply(model)
    for name in names:
        for rank in (0, 1):
            assert_same_masks(folder / f"{name}{rank}.safetensors", masks)
            state = torch.load(folder / f"{name}{rank}.pt")
            for key, value in model.state_dict().items():
                torch.testing.assert_close(state[key], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", RUNS)
def test_masks_and_new_values_are_those_of_one_process(folder, name):
    kind, method, options = RUNS[name]
    assert_as_in_one_process(folder, [name], kind, method=method, **options)


def test_a_pass_goes_on_from_the_checkpoint_of_the_first_process(folder):
    family = Family(GOLDEN / "vit")
    expected = prune(family.model(), family.batches()[:3], method="snip", sparsity=0.75)
    for rank in (0, 1):
        assert_same_masks(folder / f"resumed{rank}.safetensors", expected)
    assert [path.name for path in folder.glob("pass.ckpt*")] == ["pass.ckpt"]


def test_a_batch_that_is_not_finite_is_left_out_by_both(folder):
    family = Family(GOLDEN / "vit")
    expected = prune(family.model(), family.batches()[:1], method="chita", sparsity=0.5, **CHITA)
    for rank in (0, 1):
        found = Masks.load(folder / f"skipped{rank}.safetensors")
        assert all(torch.equal(found.packed[name], bits) for name, bits in expected.packed.items())
        assert "the loss 'ce' of batch 1 is nan" in (folder / f"nan{rank}").read_text()


def test_gradients_and_frozen_parameters_of_the_user_stay(folder):
    for rank in (0, 1):
        assert (folder / f"found{rank}").read_text() == "True False True"


def test_sharded_momentum_copies_are_rejected_with_what_to_do(folder):
    for rank in (0, 1):
        assert "fully_shard(model, ignored_params=" in (folder / f"twins{rank}").read_text()


def test_processes_that_read_different_data_are_told(folder):
    for rank in (0, 1):
        assert "process 1 read other data" in (folder / f"data{rank}").read_text()
        assert "process 1 read other data (1 batches" in (folder / f"walked{rank}").read_text()


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Path:
    """Where two processes left what they found in walks over models that are sharded otherwise."""
    folder = tmp_path_factory.mktemp("walked")
    run_two_processes(SCRIPT, folder, "long")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("name", WALKS)
def test_walks_find_the_same_however_a_model_is_sharded(walked, name):
    kind, options = WALKS[name]
    names = [f"{name} {way} " for way in WAYS]
    assert_as_in_one_process(walked, names, kind, walk="blocks", **options)


@pytest.mark.long
def test_a_walk_runs_in_the_precision_that_a_model_is_sharded_with(walked):
    model = chat_models.qwen()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    batches = Qwen(*[True] * 5).batches()
    expected = prune(model, batches, method="wanda", sparsity=0.75, walk="blocks")
    for rank in (0, 1):
        found = Masks.load(walked / f"cast{rank}.safetensors")
        assert all(torch.equal(found.packed[name], bits) for name, bits in expected.packed.items())


@pytest.mark.long
def test_a_walk_leaves_a_batch_of_one_process_out_and_the_model_can_be_trained(walked):
    batches = Qwen(*[True] * 5).batches()
    model = chat_models.qwen()
    left = [*batches[:3], batches[4]]
    expected = prune(model, left, method="wanda", sparsity=0.75, walk="blocks")
    model(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
    for rank in (0, 1):
        found = Masks.load(walked / f"skipped{rank}.safetensors")
        assert all(torch.equal(found.packed[name], bits) for name, bits in expected.packed.items())
        assert "in batch 3" in (walked / f"nan{rank}").read_text()
        trained = torch.load(walked / f"trained{rank}.pt")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(trained[name], parameter.grad)


@pytest.mark.long
def test_a_walk_over_a_tensor_parallel_model_is_refused(walked):
    for rank in (0, 1):
        assert "by fully_shard alone" in (walked / f"parallel{rank}").read_text()


@pytest.mark.long
def test_a_walk_that_one_process_breaks_off_ends_in_both_and_resumes(walked):
    family = family_of("words")
    batches = family.batches()
    expected = prune(family.model(), batches, method="wanda", sparsity=0.75, walk="blocks")
    for rank in (0, 1):
        assert "broken off" in (walked / f"broken{rank}").read_text()
        assert_same_masks(walked / f"walk{rank}.safetensors", expected)
