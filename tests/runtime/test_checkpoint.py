"""The one resumable state: whole or not at all, of this run or refused, one for all processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import run_two_processes

from vlp_plugins.runtime import checkpoint as room
from vlp_plugins.runtime.artifacts import Format
from vlp_plugins.runtime.checkpoint import Checkpoint
from vlp_plugins.runtime.errors import DataError, MaskError, OutputError

FORM = Format("checkpoint", "vlp_toy", 2, DataError, "delete it and start again")
TENSORS = {
    "weights": torch.arange(6.0).view(2, 3).bfloat16(),
    "bits": torch.tensor([True, False]),
    "step": torch.tensor(3.0),
    "nothing": torch.zeros(0, 4),
}
CONTENT = {"place": {"step": 3, "loss": 0.1 + 0.2}, "seen": [["ab", 1]]}


def file_in(folder: Path, form: Format = FORM, **identity: Any) -> Checkpoint:
    given = {"method": "toy", "target": (0.5, None)} | identity
    return Checkpoint(folder / "toy.safetensors", form, given, unit="step")


def state(tensors: Any, content: Any) -> Any:
    return tensors, {key: content[key] for key in CONTENT}


def test_a_state_comes_back_bit_by_bit(tmp_path) -> None:
    file_in(tmp_path).save(lambda: (TENSORS, CONTENT))
    tensors, content = file_in(tmp_path).load(state) or ({}, {})
    assert content == CONTENT
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_without_a_file_a_run_starts_and_says_so(tmp_path, caplog) -> None:
    assert file_in(tmp_path).load(state) is None
    assert "starting from the first step" in caplog.text


def test_without_a_folder_nothing_is_kept_and_nothing_converted() -> None:
    file = Checkpoint.of_run(None, "toy", FORM, {}, unit="step")
    file.begin()
    file.save(lambda: pytest.fail("nobody asked for it"))
    with pytest.raises(DataError, match="give workplace"):
        file.load(state)


def test_files_of_one_folder_are_told_apart_by_their_identity(tmp_path) -> None:
    paths = {
        Checkpoint.of_run(tmp_path, "toy", FORM, {"target": t}, unit="step").path
        for t in (0.5, 0.75, {"vision": 0.5}, 0.5)
    }
    assert len(paths) == 3


@pytest.mark.parametrize(("theirs", "mine"), [({"seed": 1}, {"seed": 2}), ({"seed": 1}, {})])
def test_a_state_of_another_run_is_refused(tmp_path, theirs, mine) -> None:
    file_in(tmp_path, **theirs).save(lambda: (TENSORS, CONTENT))
    with pytest.raises(DataError, match=r"another run: its seed is 1, this one's is .*delete it"):
        file_in(tmp_path, **mine).load(state)


def test_a_state_of_an_earlier_format_says_who_can_resume_it(tmp_path) -> None:
    file_in(tmp_path, replace(FORM, schema=1)).save(lambda: (TENSORS, {"made_by": "vlp 0.1"}))
    with pytest.raises(DataError, match=r"format 1 of .*\(vlp 0.1\), .*that version, or delete"):
        file_in(tmp_path).load(state)
    file_in(tmp_path).save(lambda: (TENSORS, CONTENT))  # not resumed, it is replaced
    assert file_in(tmp_path).load(state)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (None, r"is damaged \(KeyError: 'seen'\); delete it"),
        ("vlp 0.1", r"was written by vlp 0.1 .*KeyError: 'seen'.*resume with that version, or del"),
    ],
)
def test_a_state_that_lacks_something_is_refused_in_a_sentence(tmp_path, program, message) -> None:
    content = {"place": {}} | ({} if program is None else {"made_by": program})
    file_in(tmp_path).save(lambda: (TENSORS, content))
    with pytest.raises(DataError, match=message):
        file_in(tmp_path).load(state)


def test_an_error_of_the_owner_passes(tmp_path) -> None:
    def refused(tensors: Any, content: Any) -> None:
        raise MaskError("of other masks")

    file_in(tmp_path).save(lambda: (TENSORS, CONTENT))
    with pytest.raises(MaskError, match="of other masks"):
        file_in(tmp_path).load(refused)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_damaged_state_is_refused(tmp_path, size) -> None:
    file = file_in(tmp_path)
    file.save(lambda: (TENSORS, CONTENT))
    assert file.path is not None
    file.path.write_bytes(file.path.read_bytes()[:size])
    with pytest.raises(DataError, match="damaged, truncated.*delete it"):
        file.load(state)


def test_an_interrupted_write_leaves_the_state_before(tmp_path, monkeypatch) -> None:
    file = file_in(tmp_path)
    file.save(lambda: (TENSORS, CONTENT))

    def interrupted() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file.save(interrupted)
    monkeypatch.setattr(room, "write_artifact", lambda *_, **__: interrupted())
    with pytest.raises(KeyboardInterrupt):
        file.save(lambda: ({}, {}))
    tensors, _ = file.load(state) or ({}, {})
    assert tensors.keys() == TENSORS.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["toy.safetensors"]


def test_a_run_that_resumes_nothing_asks_for_its_place_first(tmp_path, caplog) -> None:
    file = file_in(tmp_path)
    file.begin()
    file.save(lambda: (TENSORS, CONTENT))
    file.begin()
    assert "is not resumed and will be overwritten" in caplog.text
    (tmp_path / "toy.safetensors").write_text("years of work")
    with pytest.raises(OutputError, match="no run wrote what is there"):
        file.begin()


def test_each_process_may_have_a_file_of_its_own(tmp_path) -> None:
    def of(rank: int, world: int) -> Checkpoint:
        return Checkpoint(tmp_path / "a[1]", FORM, {}, unit="batch", shard=(rank, world))

    for rank in (0, 1):
        of(rank, 2).save(lambda rank=rank: ({}, {"rank": rank}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a[1].rank0of2", "a[1].rank1of2"]
    assert of(1, 2).load(lambda _, content: content["rank"]) == 1
    for rank, world in ((0, 1), (2, 3)):
        with pytest.raises(DataError, match="rank0of2 was written by another number of processes"):
            of(rank, world).load(state)


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from torch import distributed
from test_checkpoint import CONTENT, TENSORS, file_in, state
from vlp_plugins.runtime.distributed import process_group, rank_and_size
from vlp_plugins.runtime.errors import VlpError

with process_group("cpu"):
    rank = rank_and_size()[0]
    folder = Path(sys.argv[1]) / str(rank)  # of another disk, as far as rank 1 can tell
    folder.mkdir()
    said = {}
    file_in(folder).begin()
    file_in(folder).save(lambda: (TENSORS, {**CONTENT, "seen": rank}))
    tensors, content = file_in(folder).load(state)
    said["same"] = all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    said["seen"] = content["seen"]
    said["files"] = len(list(folder.iterdir()))
    for name, work in {
        "other": lambda: file_in(folder, seed=1).load(state),
        "disk": lambda: file_in(Path("/proc/no")).save(lambda: ({}, {})),
        "convert": lambda: file_in(folder).load(lambda *_: {}[rank] if rank else None),
    }.items():
        try:
            work()
        except VlpError as error:
            said[name] = f"{type(error).__name__}: {error}"
    (Path(sys.argv[1]) / f"said{rank}.json").write_text(json.dumps(said))
    distributed.barrier()
"""


def test_rank_0_reads_and_writes_for_all_and_errors_are_of_all(tmp_path) -> None:
    run_two_processes(SCRIPT, tmp_path)
    found = [json.loads((tmp_path / f"said{rank}.json").read_text()) for rank in (0, 1)]
    assert [each.pop("files") for each in found] == [1, 0]
    for each in found:
        assert each["same"]
        assert each["seen"] == 0
        assert "another run: its seed is None, this one's is 1" in each["other"]
        assert each["disk"].startswith("OutputError: ")
        assert "KeyError: 1" in each["convert"]
    assert found[1]["disk"].endswith(found[0]["disk"].removeprefix("OutputError: "))
