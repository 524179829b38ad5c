"""Run the notebook from a clean kernel on a Hub of its own, and keep its real outputs.

python -m tests.notebook
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.hub.server import HubServer


ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "qat_digits_to_hub.ipynb"

#: Of the whole notebook.
SECONDS = 280


def execute(directory: Path) -> tuple[NotebookNode, HubServer]:
    """Run all cells, top to bottom.

    Args:
        directory: where the kernel works.

    Returns:
        The notebook with what the cells printed, and the Hub as the notebook left it.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with HubServer() as hub:
        environment = {**os.environ, **hub.environment(directory / "home"), "PYTHONPATH": python_path}
        client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(directory)}})
        client.execute(env=environment)
    return notebook, hub


def main() -> None:
    """Write the outputs into the notebook."""
    with tempfile.TemporaryDirectory() as directory:
        notebook, _ = execute(Path(directory))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
