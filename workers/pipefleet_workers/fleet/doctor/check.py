"""The outcome of one check of `pipefleet doctor`: its name, whether it holds, and a sentence of detail.

`report` passes the function of a check and the settings to `checked`, and gets a `Check`. `pools` makes its own.
`checked` raises nothing: each error of a check becomes a failed `Check`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipefleet.errors import PipefleetError
from pipefleet.settings import Settings


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    detail: str

    def to_json(self) -> dict[str, Any]:
        """The form that `--json` prints."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail}


def checked(name: str, check: Callable[[Settings], str], settings: Settings) -> Check:
    """The outcome of one check. An error of any kind makes this check fail, and leaves the other checks alone."""
    try:
        return Check(name, True, check(settings))
    except PipefleetError as error:
        return Check(name, False, str(error))
    except ModuleNotFoundError as error:
        return Check(name, False, f"{error.name} is not installed; install it with pip install 'pipefleet[workers]'")
    except Exception as error:  # noqa: BLE001 - a check that breaks is a finding, not an end
        return Check(name, False, f"{type(error).__name__}: {error}")
