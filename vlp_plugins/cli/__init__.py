"""The `vlp` command. Commands are thin: each reads its options, calls the API, prints.

Importing it stays cheap: what a command works with is imported when the command runs.
"""

from __future__ import annotations

from vlp_plugins.cli.compare import compare
from vlp_plugins.cli.evaluate import evaluate
from vlp_plugins.cli.finetune import finetune
from vlp_plugins.cli.id import id_
from vlp_plugins.cli.init import init
from vlp_plugins.cli.inspect import inspect, plugins
from vlp_plugins.cli.masks import masks
from vlp_plugins.cli.methods import methods
from vlp_plugins.cli.nni_trial import nni_best, nni_trial
from vlp_plugins.cli.plan import plan
from vlp_plugins.cli.program import main
from vlp_plugins.cli.prune import prune
from vlp_plugins.cli.sensitivity import sensitivity

__all__ = ["main"]

COMMANDS = (
    init, prune, compare, plan, id_, sensitivity, finetune, evaluate, inspect, methods, masks,
    nni_trial, nni_best, plugins,
)  # fmt: skip

for command in COMMANDS:
    main.add_command(command)
