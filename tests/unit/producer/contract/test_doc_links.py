"""Every link of the documentation leads to a file or folder of this tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_map_names_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    packages = [ROOT / "producer" / "pipefleet", ROOT / "workers" / "pipefleet_workers"]
    rooms = [room.parent for package in packages for room in package.glob("*/__init__.py")]
    assert [str(room) for room in rooms if f"](../{room.relative_to(ROOT)})" not in text] == []
