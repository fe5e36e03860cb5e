"""How long a fleet takes from nothing to ready: the stack of `pipefleet demo`, its servers, Flower, and two warm workers."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

from pipefleet_workers.fleet.demo import weights
from pipefleet_workers.fleet.local.stack import Stack
from tests.benchmarks.workloads import MODELS

POOLS = {
    "speech": ("automatic-speech-recognition", weights.whisper_tiny_en),
    "embeddings": ("feature-extraction", lambda _: weights.minilm()),
}


def measure(scratch: Path) -> dict[str, float]:
    """Seconds until every worker is ready."""
    fleet = scratch / "start.toml"
    tables = [f'[pools.{name}]\ntask = "{task}"\nmodel = "{model(MODELS)}"\n' for name, (task, model) in POOLS.items()]
    fleet.write_text("\n".join(tables))
    begin = time.perf_counter()
    with Stack(scratch / f"data-{uuid.uuid4().hex[:8]}", fleet=fleet, pools=list(POOLS), flower=True):
        return {"workers": len(POOLS), "seconds": round(time.perf_counter() - begin, 2)}
