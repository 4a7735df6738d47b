"""The process group of `torchrun` ends with its block."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import gc
import weakref
from torch import distributed
from vlp_plugins.launch import process_group, wait_for_all

with process_group():
    import torch.distributed.fsdp  # models of transformers import such modules
    import torch.distributed.nn
    import torch.distributed.optim
    group = weakref.ref(distributed.group.WORLD)
    assert group().size() == 2
    wait_for_all()
gc.collect()
assert group() is None, "its threads may abort a process whose interpreter ends"
"""


def test_nothing_keeps_the_group_beyond_the_block(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*launch, "2", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
