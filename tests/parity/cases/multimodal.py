"""Tasks that bring text together with pictures, sound or video."""

from __future__ import annotations

from tests.parity.cases.case import Case

CASES: tuple[Case, ...] = ()
