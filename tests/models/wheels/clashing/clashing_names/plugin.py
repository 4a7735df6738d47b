"""`magnitude` is a built-in score; `two_towers` is the adapter of `acme-pruning`."""

from vlp_plugins.extend import Adapter, Scorer, hookimpl


class Largest(Scorer):
    """Keeps the smallest weights."""

    name = "magnitude"

    def score(self, weight, evidence):
        return -weight.detach().abs().float()


class NothingAdapter(Adapter):
    """Claims no model."""

    name = "two_towers"

    def claims(self, model):
        return False

    def weights(self, model):
        return ()

    def streams(self, model, batch, *, published=False):
        return iter(())


@hookimpl
def vlp_scorers():
    return {"magnitude": Largest}


@hookimpl
def vlp_adapters():
    return {"two_towers": NothingAdapter}
