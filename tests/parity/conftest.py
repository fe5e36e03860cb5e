"""An S3 server for the tests of this folder: the embedded stack without workers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipefleet.storage.store import ObjectStore
from pipefleet_workers.fleet.local.stack import Stack


@pytest.fixture(scope="package")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A client of a running S3 server with the bucket `pipefleet`; its settings are in this process's environment."""
    with Stack(tmp_path_factory.mktemp("stack") / "data", pools=(), flower=False) as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in stack.environment().items():
                patch.setenv(name, value)
            patch.delenv("AWS_ENDPOINT_URL", raising=False)
            yield ObjectStore()
