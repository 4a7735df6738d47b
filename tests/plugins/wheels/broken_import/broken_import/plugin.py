"""The import fails before any hook is defined."""

import a_module_that_nobody_installed  # noqa: F401
from vlp_plugins.hookspecs import hookimpl
from vlp_plugins.scoring.magnitude import Magnitude


@hookimpl
def vlp_scorers():
    return {"score_of_broken_import": Magnitude}
