"""What a loading process runs first, in place of the command that started it.

That command would import JAX, a second or two and its memory in every process, and so would grain
where JAX is installed. Loading needs neither.
"""

from __future__ import annotations

import logging
import signal
import sys

if __name__ == "__mp_main__":
    sys.modules.setdefault("jax", None)  # an import of it fails, and grain goes on without
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's to handle
    logging.disable(logging.WARNING)  # grain says that it found no JAX
    import grain  # noqa: F401

    logging.disable(logging.NOTSET)
