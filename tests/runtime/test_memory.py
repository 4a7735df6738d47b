"""How much memory a process holds."""

from __future__ import annotations

import mmap
import subprocess
import sys
import time

import torch

from benchmarks.memory import peak_memory
from vlp_plugins.runtime.memory import (
    peak_device_bytes,
    peak_resident_bytes,
    resident_bytes,
)

SIZE = 64 << 20


def test_a_block_that_fills_memory_has_a_peak() -> None:
    # Pages of its own: a tensor may be laid into memory that earlier tests have left behind.
    with peak_memory() as meter, mmap.mmap(-1, SIZE) as block:
        for page in range(0, SIZE, mmap.PAGESIZE):
            block[page] = 1
        time.sleep(0.05)
    assert meter.extra >= 0.9 * SIZE
    assert meter.peak >= meter.start


def test_the_peak_of_the_process_stays_when_memory_is_given_back() -> None:
    block = torch.ones(SIZE, dtype=torch.uint8)
    peak = peak_resident_bytes()
    assert peak >= 0.95 * resident_bytes()
    del block
    assert peak_resident_bytes() >= 0.99 * peak


def test_the_peak_is_of_this_program_not_of_who_started_it() -> None:
    """The tests hold hundreds of megabytes; a child that imports nothing holds few."""
    block = torch.ones(4 * SIZE, dtype=torch.uint8)
    code = "from vlp_plugins.runtime import memory; print(memory.peak_resident_bytes())"
    code = f"import sys, types; sys.modules['torch'] = types.ModuleType('torch'); {code}"
    done = subprocess.run([sys.executable, "-c", code], stdout=-1, text=True, check=True)
    assert int(done.stdout) < 2 * SIZE <= block.numel()


def test_tensors_on_the_cpu_are_no_device_memory() -> None:
    assert peak_device_bytes(torch.device("cpu")) is None
