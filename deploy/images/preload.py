"""`preload.py FLEET_FILE`: puts the hub models of a fleet file into the image's cache, at their pinned revisions.

Safetensors only, as the workers load. Models under s3:// are left to the workers, which cache them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from huggingface_hub import snapshot_download

from pipefleet.errors import PipefleetError
from pipefleet.fleet.file import load_fleet
from pipefleet.fleet.pools import Pool

FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]


def wanted(path: Path) -> list[Pool]:
    """The pools whose model is on the hub. Raises FleetFileError, also for a model without a revision."""
    return [pool for pool in load_fleet(path).pools.values() if pool.is_hub]


def main(path: Path) -> None:
    """Download each model."""
    for pool in wanted(path):
        print(f"{pool.name}: {pool.model}@{pool.revision}", flush=True)
        snapshot_download(pool.model, revision=pool.revision, allow_patterns=FILES)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except (PipefleetError, OSError) as error:
        sys.exit(f"preload: {error}")
