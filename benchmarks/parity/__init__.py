"""Parity with published code: `python -m benchmarks.parity DIR`.

DIR has one folder per model family with recorded inputs and outputs. One module per family here
rebuilds the recorded model: `model_from_golden`, `batches_from_golden`, `outputs`. A folder
`id` has point clouds and their recorded intrinsic dimensions (`dimensions.py`).
`chita_problems` is a command of its own, for stored problems of CHITA.
"""
