"""Threads that capture or export take turns: PyTorch's exporter keeps its modes and patches for the whole process.

Without that, parts cannot be captured now and then, and stay float. Threads that only compute go on meanwhile.
"""

from __future__ import annotations

import threading


#: Who holds it, may capture and export; the same thread may take it again.
TURN = threading.RLock()
