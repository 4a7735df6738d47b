"""`vlp_adapters` takes no argument; the right hook beside it must not be registered either."""

from vlp_plugins.extend import Magnitude, hookimpl


@hookimpl
def vlp_adapters(config):
    return {"adapter_of_broken_signature": config}


@hookimpl
def vlp_scorers():
    return {"score_of_broken_signature": Magnitude}
