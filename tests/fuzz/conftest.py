"""The fixture of the fuzz tests."""

from collections.abc import Callable

import pytest
from fuzz.runner import Fuzz


@pytest.fixture
def fuzz(capfd: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]) -> Fuzz:
    return Fuzz(capfd, record_property)
