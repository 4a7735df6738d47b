"""Table 7: what is measured of a method, kept, resumed and shown; on a tiny model."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.papers import runtimes, table7
from benchmarks.papers.runtimes import BATCHES, METHODS, Runtime
from benchmarks.papers.stopwatch import Others, TimedBatches
from benchmarks.speed.workload import random_batches
from vlp_adapters.blip import BlipForPretraining, BlipPretrainConfig
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.errors import OutputError
from vlp_plugins.runtime.files import write_text


def tiny_problem(model: str) -> tuple[nn.Module, list[Batch]]:
    """BLIP with one narrow layer per tower, and as many batches as at full size."""
    assert model == "blip"
    torch.manual_seed(0)
    size = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    config = BlipPretrainConfig(
        vision_config={**size, "image_size": 16, "patch_size": 8},
        text_config={
            **size,
            "vocab_size": 110,
            "max_position_embeddings": 32,
            "bos_token_id": 108,
        },
        embed_dim=8,
        queue_size=8,
        dec_token_id=108,
        enc_token_id=109,
    )
    batches: list[Batch] = [
        {
            **batch,
            "pixel_values": batch["pixel_values"][..., :16, :16],
            "input_ids": batch["input_ids"] % 100,
        }
        for batch in random_batches(BATCHES, 4, torch.device("cpu"))
    ]
    return BlipForPretraining(config).eval(), batches


class Inline:
    """Stands for a process: runs what it is given at once, and fails as a process does."""

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.target, self.args, self.exitcode = target, args, 0

    def start(self) -> None:
        try:
            self.target(*self.args)
        except Exception:
            self.exitcode = 1

    def join(self) -> None:
        """Has ended."""

    terminate = join


def options(folder: Path, **others: Any) -> argparse.Namespace:
    """What the command line gives."""
    given = dict.fromkeys(("models", "methods", "minutes")) | {"list": False, "render": False}
    given["tables"] = ["table7"]
    return argparse.Namespace(**(given | {"cells": folder / "cells"} | others))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "THREADS", torch.get_num_threads())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_measured_between_two_runs_of_multiflow(
    method: str, tmp_path: Path
) -> None:
    cell = Runtime("blip", method)
    cell.run(tmp_path, tiny_problem)

    found = cell.content(tmp_path)
    assert found is not None
    own, sides = found["measured"], found["multiflow"]
    assert found["ratio"] == pytest.approx(
        2 * own["seconds"] / (sides[0]["seconds"] + sides[1]["seconds"]), rel=0.05
    )
    for each in (own, *sides):
        assert 0 < each["data"] < each["seconds"]
        assert each["rest"] == pytest.approx(each["seconds"] - each["data"], abs=0.002)
        assert each["peak_bytes"] >= each["extra_peak_bytes"] >= 0
    assert found["kept"] == found["elements"] - int(0.75 * found["elements"])
    assert found["rows_kept_in"] == ("ram" if method.startswith("chita") else None)


def test_all_methods_read_as_many_batches() -> None:
    for parameters in METHODS.values():
        rounds = parameters.get("rounds", 1)
        per_round = parameters.get("batches_per_round", parameters.get("rows", BATCHES))
        assert rounds * per_round == BATCHES


def test_time_in_batches_ends_when_they_are_done_or_the_next_is_asked_for() -> None:
    batches = TimedBatches([{}, {}, {}])
    for index, _ in enumerate(batches):
        time.sleep(0.02)
        if index == 1:
            batches.done()
            time.sleep(0.2)
    assert 0.06 <= batches.seconds < 0.2


def test_work_of_other_processes_is_told_and_own_is_not() -> None:
    others = Others()
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        pass
    cores = others.cores()
    assert cores is None or 0 <= cores <= (os.cpu_count() or 1)


def test_what_is_there_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(tmp_path)
    done = Runtime("blip", "multiflow")
    write_text(done.path(given.cells), json.dumps(done.identity()))
    begun: list[str] = []

    def measured(missing: list[Runtime], out: Path, limit: float) -> list[Runtime]:
        begun.extend(each.method for each in missing)
        return missing[:1]

    monkeypatch.setattr(table7, "measured", measured)
    assert table7.run(given) == 1
    assert begun == ["snip", "itersnip", "chita", "chita++"]
    assert table7.run(options(tmp_path, list=True, methods=["multiflow", "chita"])) == 0
    listed = capsys.readouterr().out.splitlines()[-2:]
    assert listed == ["done    blip-base/runtime/multiflow", "missing blip-base/runtime/chita"]


def test_other_settings_are_noticed(tmp_path: Path) -> None:
    cell = Runtime("blip", "chita")
    content = {**cell.identity(), "batches": 6}
    write_text(cell.path(tmp_path), json.dumps(content))
    with pytest.raises(OutputError, match=r"other settings \(batches\)"):
        cell.content(tmp_path)
    cell.path(tmp_path).write_text("{")
    with pytest.raises(OutputError, match="damaged"):
        cell.content(tmp_path)


def test_one_that_fails_is_reported_and_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(self: Runtime, out: Path) -> None:
        if self.method == "chita":
            raise MemoryError
        write_text(self.path(out), json.dumps({**self.identity(), "ratio": 2.0}))

    monkeypatch.setattr(Runtime, "run", run)
    context = argparse.Namespace(Process=Inline)
    monkeypatch.setattr("multiprocessing.get_context", lambda how: context)
    asked = [Runtime("blip", "chita"), Runtime("blip", "snip")]

    assert table7.measured(asked, tmp_path) == asked[:1]
    said = capsys.readouterr().out
    assert "chita: FAILED" in said
    assert "snip: ratio 2.00" in said
    assert table7.measured(asked, tmp_path, limit=-1) == []


def test_the_page_stands_beside_the_paper_and_tells_what_is_missing(tmp_path: Path) -> None:
    given = options(tmp_path, render=True)
    side = {"seconds": 2.0, "data": 1.5, "rest": 0.5, "peak_bytes": 2**31, "extra_peak_bytes": 0}
    cell = Runtime("blip", "snip")
    content = {
        **cell.identity(),
        "machine": {"threads": 2},
        "others": 0.02,
        "rows_kept_in": None,
        "multiflow": [side, side],
        "measured": {**side, "seconds": 7.0, "data": 6.5},
        "ratio": 3.5,
    }
    write_text(cell.path(given.cells), json.dumps(content))

    assert table7.run(given) == 0
    page = (tmp_path / "table7.md").read_text(encoding="utf-8")
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line[:1] == "|"}
    assert [text.strip() for text in lines["snip"].split("|")[2:7]] == [
        "3.50", "2.82", "7.0", "6.5", "0.5",
    ]  # fmt: skip
    assert [text.strip() for text in lines["chita++"].split("|")[2:4]] == ["-", "41.30"]
    assert "X-VLM" not in page
    assert (tmp_path / "table7.svg").read_text(encoding="utf-8").startswith("<svg")
