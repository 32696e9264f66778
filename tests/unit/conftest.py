"""What tests of this folder share."""

from collections.abc import Iterator

import pytest

from softmax_ext import ops


@pytest.fixture(params=ops.library.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = ops.library.selected_isa()
    ops.library.select_isa(request.param)
    yield request.param
    ops.library.select_isa(before)
