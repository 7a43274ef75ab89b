"""Files that stand in the place of others: a Git LFS pointer, a web page, a message of a server, an empty file."""

import json
import re

START_BYTES = 512
"""How much of a file's start :func:`stand_in` needs."""

_TEXT = re.compile(rb"[\t\n\f\r\x20-\x7e\x80-\xff]+")


def stand_in(start: bytes) -> str | None:
    """What a file is in place of the one expected, and what to do, as a clause; None where it may be what it should be.

    ``start``: the first :data:`START_BYTES` bytes of the file, or all of it.
    """
    if not start:
        return "is empty: fetch it again"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    lower = text[:100].lower()
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        return (
            "is a Git LFS pointer, not the file itself: run `git lfs install` and `git lfs pull` in its repository, "
            "or download the file by itself"
        )
    if lower.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, not the file itself: its download was answered with a web page; fetch it again"
    if lower.startswith(b"<?xml") or re.match(rb"<[a-z!]", lower):
        return f"is an XML or HTML page, not the file itself ({_shown(text)}): fetch it again"
    if text[:1] in (b"{", b"[") and _TEXT.fullmatch(start):
        return f"is a JSON text, not the file itself ({_shown(text)}): fetch it again"
    if _TEXT.fullmatch(start) and _is_utf8(text):
        return f"is a text, not the file itself ({_shown(text)}): fetch it again"
    return None


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
        return True
    except UnicodeDecodeError as error:
        return error.start > len(text) - 4  # a character that the end of ``start`` cuts


def _shown(text: bytes) -> str:
    """The beginning of a text, on one line, with odd characters escaped."""
    words = " ".join(text[:80].decode("utf-8", errors="replace").split())
    return json.dumps(words, ensure_ascii=True)
