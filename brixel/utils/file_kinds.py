"""What often lies in the place of a binary file: a pointer of Git LFS, a page of a web server, some text, nothing."""

_SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"),
    (b"<!doctype html", "an HTML page, as servers send in place of a file: check the address, and download it again"),
    (b"<html", "an HTML page, as servers send in place of a file: check the address, and download it again"),
    (b"<svg", "an SVG drawing: export it as PNG"),
    (b"<?xml", "an XML document, as servers send with an error: check the address, and download it again"),
    (b"{", "JSON text, as servers send with an error: check the address, and download it again"),
    (b"%pdf", "a PDF document: export its pages as PNG"),
    (b"%!ps", "a PostScript document: export it as PNG"),
    (b"pk\x03\x04", "a zip archive: unpack it"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"\x00\x05\x16\x07", "a file of macOS about another file (AppleDouble): give the file without the leading '._'"),
)

HEAD_BYTES = 512
"""How much of a file :func:`other_content` needs."""


def other_content(head: bytes) -> str | None:
    """What a file is, and what to do, if it is none that is binary on purpose; None if its first bytes do not say."""
    if not head:
        return "an empty file: fetch or export it again"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    found = next((what for signature, what in _SIGNATURES if text.startswith(signature)), None)
    if found is not None and text.startswith(b"<?xml") and (b"<svg" in text or b"<html" in text):
        return other_content(text[text.index(b"<svg" if b"<svg" in text else b"<html") :])
    return found or (None if any(head.strip(b"\0")) else "only zeros: fetch or export it again")
