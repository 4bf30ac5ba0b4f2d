"""A layer of the tests' own stands for every quantised one, registered anew for each test."""

import pytest

from tests.helpers.quantised_layers import registered


@pytest.fixture(autouse=True)
def dequantisations():
    return registered()
