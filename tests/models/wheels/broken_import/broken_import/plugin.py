"""The import fails before any hook is defined."""

import a_module_that_nobody_installed  # noqa: F401
from vlp_plugins.extend import Magnitude, hookimpl


@hookimpl
def vlp_scorers():
    return {"score_of_broken_import": Magnitude}
