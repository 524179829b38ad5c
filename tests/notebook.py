"""Run notebooks from a clean kernel on a Hub of their own, and keep their real outputs.

python -m tests.notebook [NAME…]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.hub.server import HubServer


ROOT = Path(__file__).parents[1]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}

#: Of a whole notebook.
SECONDS = 280


def execute(name: str, directory: Path) -> tuple[NotebookNode, HubServer]:
    """Run all cells, top to bottom.

    Args:
        name: of the notebook, a key of `NOTEBOOKS`.
        directory: where the kernel works.

    Returns:
        The notebook with what the cells printed, and the Hub as the notebook left it.
    """
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with HubServer() as hub:
        environment = {**os.environ, **hub.environment(directory / "home"), "PYTHONPATH": python_path}
        client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(directory)}})
        client.execute(env=environment)
    return notebook, hub


def main(names: list[str]) -> None:
    """Write the outputs into the notebooks; into all without a name."""
    for name in names or NOTEBOOKS:
        with tempfile.TemporaryDirectory() as directory:
            notebook, _ = execute(name, Path(directory))
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of day
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, NOTEBOOKS[name])


if __name__ == "__main__":
    main(sys.argv[1:])
