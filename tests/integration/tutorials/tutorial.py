"""A fleet for the examples of tutorials: a pool for each of their tasks, whose worker starts when an example first wants it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pipefleet
from pipefleet.client import Client
from tests.parity.harness import load
from tests.parity.in_process_worker import working

WAIT = 120
SHORT = {"generate_kwargs": {"num_beams": 1, "max_new_tokens": 8}}
"""Random models never end by themselves."""
SERVED = {
    "classify": "text-classification",
    "zero-shot": "zero-shot-classification",
    "tables": "table-question-answering",
    "write": "text-generation",
    "translate": "translation_xx_to_yy",
    "speech": "automatic-speech-recognition:whisper",
    "ctc": "automatic-speech-recognition",
    "say": "text-to-audio",
    "pictures": "image-classification",
    "masks": "image-segmentation",
    "depth": "depth-estimation",
    "vqa": "visual-question-answering",
    "pages": "document-question-answering",
    "find": "zero-shot-object-detection",
    "chat": "image-text-to-text",
    "matches": "keypoint-matching",
}
"""pool: checkpoint. All but one are the only pool of their task."""
TABLE = {"Repository": ["Transformers", "Datasets", "Tokenizers"], "Stars": ["36542", "4512", "3934"]}
LABELS = ["sports", "politics", "travel"]


class Tutorial:
    """The fleet, whose workers are started in this process when they are first wanted."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._stack = ExitStack()
        self._working: set[str] = set()
        self._direct: dict[str, Any] = {}

    def pipe(self, pool: str, **arguments: Any) -> Any:
        """`pipefleet.pipeline` on a pool."""
        self.start(pool)
        one = self.client.fleet.pools[pool]
        return pipefleet.pipeline(one.task, model=one.model, client=self.client, **arguments)

    def start(self, pool: str) -> None:
        """A worker for a pool, unless it has one."""
        if pool not in self._working:
            self._working.add(pool)
            self._stack.enter_context(working(self.client.fleet, self.client.fleet.pools[pool], self.client.settings))

    def direct(self, pool: str) -> Any:
        """transformers' own pipeline of the pool's model."""
        if pool not in self._direct:
            self._direct[pool] = load(SERVED[pool])
        return self._direct[pool]

    def close(self) -> None:
        self._stack.close()
