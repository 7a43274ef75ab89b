"""The fixture of the fuzz tests."""

from collections.abc import Callable

import pytest
from fuzz.runner import Fuzz


@pytest.fixture
def fuzz(
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    record_property: Callable[[str, object], None],
) -> Fuzz:
    return Fuzz(capfd, caplog, record_property)
