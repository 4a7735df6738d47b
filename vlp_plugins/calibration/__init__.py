"""The pass over calibration data: what gathers statistics while the model runs.

`data_pass` goes over the batches (`batches`), lets `probe` measure what enters every layer (`once`,
`tokens`), keeps its state in a file (`checkpoint`) and adds up over processes (`processes`).
"""

from vlp_plugins.calibration.batches import interleave
from vlp_plugins.calibration.data_pass import calibrate

__all__ = ["calibrate", "interleave"]
