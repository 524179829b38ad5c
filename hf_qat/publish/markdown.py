"""Text that somebody else chose, as a part of a Markdown page: it stays text."""

from __future__ import annotations

from hf_qat.errors import printable


def in_code(text: str) -> str:
    """Between backticks, also in a cell of a table: `a|b` is written with `\\|`, a backtick becomes an apostrophe."""
    return f"`{printable(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def in_text(text: str) -> str:
    """Outside of code, where it could be HTML."""
    return printable(text).replace("&", "&amp;").replace("<", "&lt;")
