"""A compile worker that dies while it starts as long as a file says so, and else serves jobs as the real one does.
``python -m tests.stillborn_worker``, in the place of ``esper.services.tezzeret.worker_main``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

NAME = "stillborn"
"""File that says so, in the first directory of ``PYTHONPATH``."""

if __name__ == "__main__":
    if (Path(os.environ["PYTHONPATH"].split(os.pathsep)[0]) / NAME).exists():
        sys.exit("this machine lets no worker start")
    from esper.services.tezzeret.worker_main import main

    sys.exit(main())
