"""Exit codes that only workers use, and the end of a process whose threads hang; the command line has its own codes.

The device and the watchdog call `end_process`, which never returns. The jobs that the process held are
delivered to other workers.
"""

from __future__ import annotations

import logging
import os
import threading

log = logging.getLogger(__name__)
LAST_WORDS_SECONDS = 10.0
"""Seconds that the process may take to print its reason: a reader of its output may be missing."""

HUNG_FORWARD = 70
"""A forward did not return within `forward_timeout`."""
BROKEN_DEVICE = 71
"""The device answers every call with an error until the process ends, as CUDA does after an illegal access."""
HUNG_STAGE = 72
"""Decoding, preprocessing or postprocessing an item took longer than `stage_timeout`; or collating than `forward_timeout`."""


def end_process(code: int, reason: str) -> None:
    """End at once. Threads that hang in a driver or a codec cannot be ended in any gentler way."""
    # No service: the process ends with it, or before it.
    anyway = threading.Timer(LAST_WORDS_SECONDS, os._exit, (code,))
    anyway.daemon = True
    anyway.start()
    log.critical("%s; the process ends with code %d", reason, code)
    logging.shutdown()
    os._exit(code)
