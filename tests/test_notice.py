"""NOTICE lists every file that the package contains besides code, with its checksum."""

import hashlib
import re

from helpers import ROOT


def test_every_asset_is_listed_with_its_checksum():
    text = (ROOT / "NOTICE").read_text(encoding="utf-8")
    listed = {path: digest for digest, path in re.findall(r"^ +([0-9a-f]{64})  (\S+)$", text, re.MULTILINE)}
    assets = (path for path in (ROOT / "brixel" / "assets").rglob("*") if path.is_file())
    assert listed == {
        path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in assets
    }
