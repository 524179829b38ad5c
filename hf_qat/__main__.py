"""`python -m hf_qat` is `hf-qat`."""

from __future__ import annotations

import sys

from hf_qat.cli.main import main


if __name__ == "__main__":
    sys.exit(main())
