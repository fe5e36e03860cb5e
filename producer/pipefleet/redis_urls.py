"""URLs of Redis: those that can be used, in the one form that redis-py and Celery share, and why the others cannot."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlencode, urlsplit

from pipefleet.errors import nearest

_SAME = {"redis": "redis", "rediss": "rediss", "unix": "unix", "valkey": "redis", "valkeys": "rediss"}
"""Schemes, and what redis-py and Celery call them."""
_SOCKETS = ("redis+socket", "socket", "redis+unix")
"""What Celery and others call `unix`."""
_ANOTHER = re.compile(r";\s*[a-z+]+://", re.IGNORECASE)
_SENTINEL = "names Redis Sentinel, which pipefleet does not ask; name the primary itself, or an address that follows it"
_CLUSTER = "names a Redis Cluster, which pipefleet cannot use; name a single server, or the primary of replicas"
_SEVERAL = "names several servers; name one: the primary itself, or an address that follows it"


def redis_url(value: str) -> str:
    """A URL as redis-py takes it. Raises ValueError, which never repeats the URL, for one that cannot be used."""
    scheme, separator, rest = value.partition("://")
    scheme = scheme.lower()
    if separator and "sentinel" in scheme:
        raise ValueError(_SENTINEL)
    if separator and "cluster" in scheme:
        raise ValueError(_CLUSTER)
    if _ANOTHER.search(value) or "," in rest.partition("/")[0].rpartition("@")[2]:
        raise ValueError(_SEVERAL)
    if separator and scheme in _SOCKETS:
        return _socket(rest)
    if not separator or scheme not in _SAME:
        known = nearest(scheme, _SAME) if separator else ""
        raise ValueError(f"must start with redis://, rediss:// or unix://{known}")
    if scheme != "unix" and not _is_host(f"{scheme}://{rest}"):
        raise ValueError("names no host that there can be; check its dots and its letters")
    return f"{_SAME[scheme]}://{rest}"


def _is_host(url: str) -> bool:
    """Whether the host of a URL can be looked up: Python raises UnicodeError for others, which is no error of a network."""
    try:
        return bool((urlsplit(url).hostname or "localhost").encode("idna"))
    except ValueError:
        return False


def celery_url(url: str) -> str:
    """What Celery calls a URL that `redis_url` has returned."""
    scheme, _, rest = url.partition("://")
    if scheme != "unix":
        return url
    parts = urlsplit(f"unix://{rest}")
    options = [("virtual_host" if name == "db" else name, value) for name, value in parse_qsl(parts.query)]
    query = f"?{urlencode(options)}" if options else ""
    return f"redis+socket://{parts.netloc}{parts.path}{query}"


def _socket(rest: str) -> str:
    place, _, query = rest.partition("?")
    options = [("db" if name == "virtual_host" else name, value) for name, value in parse_qsl(query)]
    return f"unix://{place}" + (f"?{urlencode(options)}" if options else "")
