"""Run in a process of its own: loads folders and writes what the models in them give out."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vlp_plugins.structured.check import outputs
from vlp_plugins.structured.files import rebuild

torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    model, adapter = rebuild(folder / "model")
    found = outputs(model, adapter, load_file(folder / "batch.safetensors"))
    save_file({k: v.contiguous() for k, v in found.items()}, folder / "outputs.safetensors")
