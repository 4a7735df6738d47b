"""What a run keeps its state in: written over if a run wrote it, and by no way that links lead."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vlp_plugins
from vlp_plugins.calibration.batches import DIGEST_BYTES
from vlp_plugins.calibration.checkpoint import FORM, PassState, pack_state
from vlp_plugins.dimension.measure import FORM as DIMENSIONS
from vlp_plugins.dimension.measure import State, pack
from vlp_plugins.masks.manifest import Manifest
from vlp_plugins.masks.masks import Masks
from vlp_plugins.methods.chita.method import ChitaRun, Stage, chita_plus_plus
from vlp_plugins.methods.chita.settings import Settings
from vlp_plugins.methods.chita.solver.problem import Solution
from vlp_plugins.methods.iterative import IterativeRun, Pruned, itersnip
from vlp_plugins.methods.method import Context
from vlp_plugins.methods.rounds import FreshBatches
from vlp_plugins.models.generic import ModuleAdapter
from vlp_plugins.models.weights import WeightMap
from vlp_plugins.runtime.checkpoint import Checkpoint
from vlp_plugins.runtime.errors import OutputError
from vlp_plugins.runtime.files import append_text
from vlp_plugins.tasks.finetuning.files import LossLog
from vlp_plugins.tasks.sensitivity.curves import Group, Point
from vlp_plugins.tasks.sensitivity.files import PointsFile

DIGEST = bytes(DIGEST_BYTES)


def checkpoint(folder):
    file = Checkpoint(folder / "x.checkpoint", FORM, {}, unit="batch", shard=(0, 1))
    return file.path, lambda: file.save(lambda: pack_state(PassState(hashes=(DIGEST,)), {}))


def context_in(folder):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    adapter = ModuleAdapter(model)
    weights = WeightMap.of(model, adapter)
    return Context(model, adapter, weights, targets=[0.5], workplace=folder)


def rounds(folder):
    context = context_in(folder)
    dense = {name: torch.ones(w.shape, dtype=torch.bool) for name, w in context.weights.items()}
    masks = Masks.from_dense(dense, Manifest.for_weights(context.weights, method="toy"))
    run = IterativeRun(itersnip(), context, 0, 1, "dense", FreshBatches(()))
    file = run.checkpoint()
    return file.path, lambda: file.save(lambda: run.pack(Pruned(masks, 1)))


def stages(folder):
    setup = SimpleNamespace(settings=Settings())
    run = ChitaRun(chita_plus_plus(), context_in(folder), 0, 1, "dense", setup)
    file = run.checkpoint()
    solution = Solution(torch.tensor([1.0, 0.0]), torch.tensor([True, False]), 0.0)
    stage = Stage(solution, ())
    return file.path, lambda: file.save(lambda: run.pack(stage))


def dimensions(folder):
    file = Checkpoint(folder / "x.safetensors", DIMENSIONS, {}, unit="pass")
    return file.path, lambda: file.save(lambda: pack(State()))


def points(folder):
    def save():
        file = PointsFile(folder, "run")
        file.begin({})
        for sparsity in (0.1, 0.2):
            file.add(Group("layer", "a", "text", 0, ("a",), 4), Point(sparsity, 1, (1.0,), 0, 0))

    return folder / "points-0.jsonl", save


def losses(folder):
    def save():
        log = LossLog(folder)
        log.begin(0)
        for step in (1, 2):
            log.add({"itc": torch.tensor(1.0)})
            log.write(step, lambda mean: mean, writes=True)

    return folder / "losses.jsonl", save


STATES = [checkpoint, rounds, stages, dimensions, points, losses]


@pytest.mark.parametrize("state", STATES)
def test_a_state_replaces_a_state(tmp_path, state):
    path, save = state(tmp_path)
    save()
    first = path.read_bytes()
    save()
    assert path.read_bytes() == first
    path.write_bytes(first[: len(first) // 2])  # the disk was full, or a copy was interrupted
    save()
    assert path.read_bytes() == first


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("content", [b" ", b"years of work\n", b"\xff" * 99, b'{"kind": "diary"}'])
def test_a_state_replaces_nothing_else(tmp_path, state, content):
    path, save = state(tmp_path)
    path.write_bytes(content)
    with pytest.raises(OutputError, match="no run wrote what is there; move it away"):
        save()
    assert path.read_bytes() == content
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("exists", [True, False])
def test_a_state_follows_no_link(tmp_path, state, exists):
    folder, victim = tmp_path / "run", tmp_path / "victim"
    folder.mkdir()
    path, save = state(folder)
    save()
    own = path.read_bytes()
    path.unlink()
    if exists:
        victim.write_bytes(own)
    path.symlink_to(victim)
    with pytest.raises(OutputError, match="is a link, .*; no link is followed: remove it"):
        save()
    assert path.is_symlink()
    assert victim.exists() == exists
    assert not exists or victim.read_bytes() == own


def test_a_link_that_appears_meanwhile_is_not_appended_to(tmp_path):
    (tmp_path / "losses.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match="cannot write .*losses.jsonl"):
        append_text(tmp_path / "losses.jsonl", "x")
    assert not (tmp_path / "victim").exists()


def test_states_alone_are_written_over():
    """What a run writes over without being asked to is recognised first."""
    found = set()
    for path in Path(vlp_plugins.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            given = {k.arg: k.value for k in node.keywords} if isinstance(node, ast.Call) else {}
            if isinstance(given.get("overwrite"), ast.Constant) and given["overwrite"].value:
                found.add(f"{path.parent.name}/{path.name}")
    # Masks next to a checkpoint of the Trainer or in the work folder of a comparison, which was
    # recognised before; and records of results in folders that the run made. None is a state.
    assert found == {
        "hosts/transformers.py",
        "jobs/compare.py",
        "nni/best.py",
        "sensitivity/files.py",
    }
