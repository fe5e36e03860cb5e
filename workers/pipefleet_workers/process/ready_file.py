"""The file that tells an orchestrator that a worker is ready, `--ready-file`: looked at before the model is loaded.

`Worker` and the supervisor of several workers call `claim`. A file that cannot be written later raises UsageError.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from pipefleet.errors import UsageError


def claim(path: Path) -> None:
    """Remove the file that an earlier process may have left, and check that the folder takes a new one."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"--ready-file {path} is there and is no file; name another one")
        path.unlink(missing_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write --ready-file {path} ({error.strerror}); name a file in a folder that this user may write"
        ) from None
