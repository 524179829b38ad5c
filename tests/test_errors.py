from __future__ import annotations

import pytest

from hf_qat.errors import listed, printable


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, ""), (1, "k0"), (5, "k0, k1, k2, k3, k4"), (6, "k0, k1, k2, k3, k4 and 1 more")],
)
def test_a_long_list_is_cut_and_the_rest_counted(count: int, text: str):
    assert listed([f"k{number}" for number in range(count)]) == text


@pytest.mark.parametrize(
    ("name", "text"), [("layer.0", "layer.0"), ("größe", "größe"), ("a\nb", "a?b"), ("\x1b]0;x\x07", "?]0;x?")]
)
def test_a_name_is_printed_on_one_line_without_what_a_terminal_obeys(name: str, text: str):
    assert printable(name) == text
