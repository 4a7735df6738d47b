"""The process group of `torchrun`: what it takes, and that it ends with its block."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import gc
import weakref
from torch import distributed
from vlp_plugins.runtime.distributed import process_group, wait_for_all

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


MORE_PROCESSES_THAN_GPUS = """
import os
import torch
from torch import distributed
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.runtime.distributed import process_group, wait_for_all

os.environ["LOCAL_RANK"] = "1"
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
try:
    with process_group():
        raise AssertionError("there is one GPU")
except UnsupportedError as error:
    assert "or add --device cpu" in str(error)
torch.cuda.is_available = lambda: os._exit(9)
with process_group("cpu"):
    assert distributed.get_world_size() == 2
    wait_for_all()
"""


@pytest.mark.parametrize("text", [SCRIPT, MORE_PROCESSES_THAN_GPUS], ids=["ends", "on the CPU"])
def test_a_group_of_torchrun(tmp_path, text) -> None:
    script = tmp_path / "script.py"
    script.write_text(text)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*launch, "2", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
