"""What a command runs, from a recipe to a folder of results.

The jobs take some arguments alike: `load` gives the model, after the folder of results `out` was
found to be free; `command` repeats the run, for the report; `resume` continues from what an
interrupted run kept next to `out`; `overwrite` replaces what the same command wrote there before,
with all that is in the folder; `progress` is called with what is done and how much there is in all
(None: unknown). A `VlpError` is one line that says what to do; nothing is written then.
"""

COMPARED = ("omp", "lamp", "l2", "wanda", "multiflow", "snip", "alps")
"""Methods that are compared if none are named: one pass over the data at most, no training."""
