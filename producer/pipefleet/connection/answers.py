"""The refusals of a Redis server, each told by one word, such as `READONLY`, in any release of the server.

An exception of redis-py comes in; its word, or a sentence about the word, goes out. `errors`, `failover` and `retries` ask here.
redis-py has classes for some refusals only, and a server before 7.0 puts the word into the text of a script's error.
"""

from __future__ import annotations

import re

FULL = "OOM"
"""The server is at `maxmemory`: it refuses every command that may need memory."""
READ_ONLY = "READONLY"
UNSAVED = "MISCONF"
NO_DATABASE = "DB"
_CLIENTS = "CLIENTS"
_SENTENCES = {
    FULL: "is out of memory; raise its maxmemory, or let the workers catch up",
    READ_ONLY: "is a replica that takes no writes; name the primary in PIPEFLEET_REDIS_URL",
    "LOADING": "is still loading its data; try again in a moment",
    "MASTERDOWN": "is a replica that has lost its primary; try again in a moment, or name the primary in PIPEFLEET_REDIS_URL",
    "BUSY": "is busy with a script; try again in a moment",
    "NOREPLICAS": "takes no writes because too few replicas follow it (min-replicas-to-write); start them",
    UNSAVED: "takes no writes because it cannot save its data; see its log and the room on its disk",
    _CLIENTS: "has no place for another connection (maxclients); raise it, or close some",
    "UNBLOCKED": "has changed its role; try again in a moment",
}
_OF_REPLICAS = (READ_ONLY, "MASTERDOWN", "UNBLOCKED")
_OF_CLUSTERS = ("MOVED", "ASK", "CROSSSLOT", "CLUSTERDOWN", "TRYAGAIN")
CLUSTER = "is a node of a Redis Cluster, which pipefleet cannot use; name a single server, or the primary of replicas"
DATABASE = "has no database of this number; take a smaller one in PIPEFLEET_REDIS_URL, or raise its `databases`"
_TEXTS = {"DB index is out of range": NO_DATABASE, "max number of clients reached": _CLIENTS}
"""Answers without a word at their beginning."""
_CLASSES = {
    "OutOfMemoryError": FULL,
    "ReadOnlyError": READ_ONLY,
    "BusyLoadingError": "LOADING",
    "MasterDownError": "MASTERDOWN",
    "MovedError": "MOVED",
    "AskError": "ASK",
    "ClusterCrossSlotError": "CROSSSLOT",
    "ClusterDownError": "CLUSTERDOWN",
    "TryAgainError": "TRYAGAIN",
}
_WORD = re.compile(rf"(?:.*@user_script: ?\d+: -)?({'|'.join([*_SENTENCES, *_OF_CLUSTERS])}) ", re.DOTALL)
_PIPELINE = " of pipeline caused error: "


def word_of(error: BaseException) -> str | None:
    """The word of a refusal, such as `READONLY`; None for every other error."""
    for kind in type(error).__mro__:
        if kind.__name__ in _CLASSES:
            return _CLASSES[kind.__name__]
    text = str(error).rpartition(_PIPELINE)[2]
    found = _WORD.match(text)
    return _TEXTS.get(text.removeprefix("ERR ")) if found is None else found[1]


def sentence_of(word: str | None) -> str | None:
    """The end of a sentence about a server that answers so; None for any other word."""
    return _SENTENCES.get(word or "")


def is_of_replica(word: str | None) -> bool:
    """Whether a replica answers with this word, or a server that has just become a replica."""
    return word in _OF_REPLICAS


def is_of_cluster(word: str | None) -> bool:
    """Whether a node of a Redis Cluster answers with this word."""
    return word in _OF_CLUSTERS
