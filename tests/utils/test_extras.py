"""Optional packages: imported, or named with the extra that installs them."""

import sys

import pytest

from brixel.errors import BrixelError
from brixel.utils.extras import import_extra


def test_a_module_that_is_installed() -> None:
    import json.decoder

    assert import_extra("json.decoder", extra="plots", purpose="plots") is json.decoder


@pytest.mark.parametrize("module", ["brixel_has_no_such_package", "brixel_has_no_such_package.figure"])
def test_a_module_that_is_missing(module: str) -> None:
    message = r"^plots need 'brixel_has_no_such_package': pip install 'brixel\[plots\]'$"
    with pytest.raises(BrixelError, match=message) as raised:
        import_extra(module, extra="plots", purpose="plots")
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)


def test_a_package_without_one_of_its_modules_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "matplotlib.figure"):  # as if it were not installed
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BrixelError, match=r"^diagrams need 'matplotlib': pip install 'brixel\[evaluate\]'$"):
        import_extra("matplotlib.figure", extra="evaluate", purpose="diagrams")
