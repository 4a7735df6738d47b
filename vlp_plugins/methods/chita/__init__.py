"""CHITA and CHITA++: pruning by a quadratic model of the loss that also updates what is kept.

`settings` is what may be set. `batches` divides the calibration data, `setup` gathers rows at the
weights of the model, `solving` turns them into new weights for a lambda, `lambdas` and `held_out`
choose one, `finding` does either for a target. `procedure` is CHITA, `stages` CHITA++.
"""

from vlp_plugins.methods.chita.factories import chita, chita_plus_plus

__all__ = ["chita", "chita_plus_plus"]
