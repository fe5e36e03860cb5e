"""What `import pipefleet` offers is exactly what it says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pipefleet

PUBLIC = {
    "Client", "FleetPipeline", "Job", "JobCancelledError", "JobError", "JobExpiredError", "JobFailedError", "JobState",
    "PipefleetError", "ResultTimeoutError", "Run", "RunProgress", "ServiceUnavailableError", "Settings", "UsageError",
    "__version__", "pipeline",
}  # fmt: skip


def test_the_exported_names_are_the_agreed_ones() -> None:
    assert set(pipefleet.__all__) == PUBLIC
    assert pipefleet.__all__ == sorted(pipefleet.__all__)
    assert dir(pipefleet) == sorted(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_exported_name_is_there_and_documented(name: str) -> None:
    value = getattr(pipefleet, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__doc__


def test_type_checkers_see_the_same_names_as_programs() -> None:
    tree = ast.parse(Path(pipefleet.__file__).read_text())
    imported = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                if (node.module or "").startswith("pipefleet.") for alias in node.names}  # fmt: skip
    assert imported == PUBLIC


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="pipline"):
        pipefleet.pipline  # noqa: B018
