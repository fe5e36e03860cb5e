"""The server of the peer `LitServe`: `python -m tests.benchmarks.litserve_server PORT`, told by its environment what to serve."""

from __future__ import annotations

import sys
from typing import Any

import litserve

from tests.benchmarks.serving import Served

BATCH = 32
BATCH_TIMEOUT = 0.02
LOOPBACK = "127.0.0.1"


class Api(litserve.LitAPI):  # type: ignore[misc]
    """Batches in arrival order; at module level, because LitServe pickles it for its worker process."""

    def setup(self, device: str) -> None:
        self.served = Served.from_environment()
        self.pipe = self.served.load()

    def decode_request(self, request: dict[str, str]) -> Any:
        return self.served.fetched(request["input"])

    def predict(self, inputs: list[Any]) -> list[Any]:
        return self.served.run(self.pipe, inputs)

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any) -> dict[str, Any]:
        return {"output": output}


def main() -> None:
    """Run the server until it is ended."""
    on_cpu = Served.from_environment().machine.device == "cpu"
    api = Api(max_batch_size=BATCH, batch_timeout=BATCH_TIMEOUT)
    server = litserve.LitServer(api, accelerator="cpu" if on_cpu else "cuda", devices=1, timeout=600)
    server.run(host=LOOPBACK, port=int(sys.argv[1]), num_api_servers=1, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
