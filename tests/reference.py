"""The API reference, from the docstrings of the public names, as HTML pages by pdoc.

python -m tests.reference DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc

import hf_qat


def write(directory: Path) -> Path:
    """Write the pages; returns the one of the package."""
    for name in hf_qat.__all__:  # pdoc sees what is loaded
        getattr(hf_qat, name)
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc("hf_qat", "!hf_qat.", output_directory=directory)
    return directory / "hf_qat.html"


if __name__ == "__main__":
    print(f"Written: {write(Path(sys.argv[1]))}")
