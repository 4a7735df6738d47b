"""Parameters whose names Python keeps for itself."""

import pytest

from vlp_plugins.errors import UnknownNameError, UnsupportedError
from vlp_plugins.plugins.making import make
from vlp_plugins.plugins.offers import Offer


def offer(factory):
    return Offer("methods", "mine", factory, "mine", "mine", builtin=False)


def with_lambda(*, lambda_=0.1, size):
    return {"lambda": lambda_, "size": size}


def test_lambda_may_be_written_with_and_without_the_underscore():
    for name in ("lambda", "lambda_"):
        made = make(offer(with_lambda), {name: 2, "size": 1}, dict)

        assert made == {"lambda": 2, "size": 1}


def test_messages_list_the_name_that_users_write():
    with pytest.raises(UnknownNameError, match=r"no parameter 'lamda'; it takes lambda, size"):
        make(offer(with_lambda), {"lamda": 2}, dict)
    with pytest.raises(UnsupportedError, match="needs a value for size; it takes lambda, size"):
        make(offer(with_lambda), {"lambda": 2}, dict)
    with pytest.raises(UnsupportedError, match="'lambda' twice"):
        make(offer(with_lambda), {"lambda": 2, "lambda_": 3, "size": 1}, dict)


def test_a_factory_that_takes_anything_gets_the_name_as_it_is():
    assert make(offer(lambda **given: given), {"lambda": 2}, dict) == {"lambda": 2}
