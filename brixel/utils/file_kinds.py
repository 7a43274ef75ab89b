"""What often lies in the place of a binary file: a pointer of Git LFS, a page of a web server, some text, nothing."""

import re

_AGAIN = "as servers send in the place of a file: check the address, and download it again"
_KINDS = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"),
    (rb"(<\?xml[^>]*>)?\s*(<!--.*?-->\s*)?(<!doctype svg[^>]*>\s*)?<svg\b", "an SVG drawing: export it as PNG"),
    (rb"(<\?xml[^>]*>)?\s*(<!doctype html|<html)\b", f"an HTML page, {_AGAIN}"),
    (rb"<\?xml\b", f"an XML document, {_AGAIN}"),
    (rb"\{\s*[\"}]|\[\s*[\"\[\]{]", f"JSON text, {_AGAIN}"),
    (rb"%pdf-", "a PDF document: export its pages as PNG"),
    (rb"%!ps", "a PostScript document: export it as PNG"),
    (rb"pk\x03\x04", "a zip archive: unpack it"),
    (rb"\x1f\x8b", "a gzip archive: unpack it"),
    (rb"\x00\x05\x16\x07", "what macOS keeps beside a file (AppleDouble): give the file without '._' in its name"),
)
_PATTERNS = [(re.compile(pattern, re.IGNORECASE | re.DOTALL), kind) for pattern, kind in _KINDS]

HEAD_BYTES = 512
"""How much of a file :func:`other_content` needs."""

_STILL_BRANDS = rb"(?!avif|avis|hei[cfmsx]|hev[cx]|mif1|msf1|jp2 |jpx |crx )"  # still images in the same container
_VIDEOS = (
    (rb"....ftyp" + _STILL_BRANDS, "MP4 or QuickTime"),
    (rb"....(moov|mdat|wide|free|skip|pnot)", "QuickTime"),
    (rb"\x1a\x45\xdf\xa3", "Matroska or WebM"),
    (rb"RIFF....AVI ", "AVI"),
    (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "ASF (WMV)"),
    (rb"FLV\x01", "Flash"),
    (rb"OggS", "Ogg"),
    (rb"\x00\x00\x01\xba", "MPEG program stream"),
    (rb"(\x47.{187}){2}\x47|.{4}\x47(.{191}\x47){2}", "MPEG transport stream"),
    (rb"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02", "MXF"),
)
_VIDEO_PATTERNS = [(re.compile(pattern, re.DOTALL), kind) for pattern, kind in _VIDEOS]


def video_container(head: bytes) -> str | None:
    """The kind of container that a file of video or sound is, by its first ``HEAD_BYTES``; None for other files."""
    return next((kind for pattern, kind in _VIDEO_PATTERNS if pattern.match(head)), None)


def other_content(head: bytes) -> str | None:
    """What a file is, and what to do, if it is none that is binary on purpose; None if its first bytes do not say."""
    if not head:
        return "an empty file; fetch or export it again"
    if not any(head):
        return "only zeros; fetch or export it again"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((kind for pattern, kind in _PATTERNS if pattern.match(text)), None)
