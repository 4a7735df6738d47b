"""`vlp_adaptors` is no hook; the right hook beside it must not be registered either."""

from vlp_plugins.extend import Magnitude, hookimpl


@hookimpl
def vlp_adaptors():
    return {}


@hookimpl
def vlp_scorers():
    return {"score_of_misspelt_hook": Magnitude}
