from __future__ import annotations

import html
import re

import pytest

from hf_qat.publish.markdown import in_code, in_text


HOSTILE = (
    "layer`) <script>alert(1)</script>",
    "a | b |",
    "a\n\n# Trust me\n",
    "```\n$(rm -rf ~)",
    "\x1b]0;title\x07",
    "[link](javascript:alert(1))",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_stays_one_piece_of_code_in_one_cell(name: str):
    code = in_code(name)
    assert re.fullmatch(r"`[^`\n]+`", code) and code.isprintable()
    # How GitHub splits a row: at bars without a backslash, inside of code, too.
    assert len(re.split(r"(?<!\\)\|", f"| {code} | int8 |")) == 4


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_holds_no_tags_and_reads_as_it_was(text: str):
    escaped = in_text(text)
    assert "<" not in escaped and escaped.isprintable()
    assert html.unescape(escaped) == "".join(c if c.isprintable() else "?" for c in text)


def test_an_ordinary_name_is_as_it_was():
    assert in_code("resnet.encoder.layer_0") == "`resnet.encoder.layer_0`"
