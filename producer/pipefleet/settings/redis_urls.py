"""URLs of Redis: checked, and brought to the one form that redis-py and Celery both read.

The setting `PIPEFLEET_REDIS_URL` comes in. `redis_url` returns it for redis-py, `celery_url` for Celery. A URL that cannot be
used raises ValueError, which never repeats the URL: it may hold a password.
"""

from __future__ import annotations

import re
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from pipefleet.errors import nearest

_SAME = {"redis": "redis", "rediss": "rediss", "unix": "unix", "valkey": "redis", "valkeys": "rediss"}
"""Schemes, and the scheme that redis-py and Celery use for each."""
_SOCKETS = ("redis+socket", "socket", "redis+unix")
"""Other names of the scheme `unix`, Celery's among them."""
_ANOTHER = re.compile(r";\s*[a-z+]+://", re.IGNORECASE)
_SENTINEL = "names Redis Sentinel, which pipefleet does not ask; name the primary itself, or an address that follows it"
_CLUSTER = "names a Redis Cluster, which pipefleet cannot use; name a single server, or the primary of replicas"
_SEVERAL = "names several servers; name one: the primary itself, or an address that follows it"


_OPTIONS = (
    *("ssl_ca_certs", "ssl_ca_path", "ssl_ca_data", "ssl_certfile", "ssl_keyfile", "ssl_password", "ssl_cert_reqs"),
    *(
        "ssl_check_hostname",
        "ssl_ciphers",
        "client_name",
        "health_check_interval",
        "max_connections",
    ),
    *("protocol", "retry_on_timeout", "socket_connect_timeout", "socket_keepalive", "socket_timeout"),
)
"""Options of a URL, beside `db` and the credentials, that redis-py takes and that do not change how answers are read."""
_SSL = "ssl_"
"""Celery takes options with this prefix from a URL and fails at every other option."""
_CERT_REQS = ("none", "optional", "required")


def redis_url(value: str) -> str:
    """A URL as redis-py takes it. Raises ValueError, which never repeats the URL, for a URL that cannot be used."""
    value = value.strip()
    scheme, separator, rest = value.partition("://")
    scheme = scheme.lower()
    if separator and "sentinel" in scheme:
        raise ValueError(_SENTINEL)
    if separator and "cluster" in scheme:
        raise ValueError(_CLUSTER)
    if _ANOTHER.search(value) or "," in rest.partition("/")[0].rpartition("@")[2]:
        raise ValueError(_SEVERAL)
    if separator and scheme in _SOCKETS:
        return _plain(f"unix://{rest}")
    if not separator or scheme not in _SAME:
        known = nearest(scheme, _SAME) if separator else ""
        raise ValueError(f"must start with redis://, rediss:// or unix://{known}")
    if scheme != "unix" and not _is_host(f"{scheme}://{rest}"):
        raise ValueError("names no host that there can be; check its dots and its letters")
    return _plain(f"{_SAME[scheme]}://{rest}")


def _plain(url: str) -> str:
    """The form of a URL that redis-py and Celery read alike: the database in the path, or in `db` for a socket."""
    parts = _parts(url)
    if parts is None:
        return url  # the check of the host will say what is wrong
    options = dict(parse_qsl(parts.query))
    path = parts.path
    place = options.pop("virtual_host", None)
    database = options.pop("db", place)
    if parts.scheme != "unix":
        database = unquote(path).strip("/") if database is None else database
        path = f"/{_number(database)}" if database else path
    elif path in ("", "/"):
        raise ValueError("must name the path of a socket, as in unix:///run/redis.sock")
    elif database:
        options["db"] = _number(database)
    netloc = _with_credentials(parts.netloc, options)
    _check(options)
    return _written(parts.scheme, netloc, path, options)


def _parts(url: str) -> SplitResult | None:
    """The parts of a URL; None where its host or its port cannot be read."""
    try:
        parts = urlsplit(url)
        return parts if parts.scheme == "unix" or parts.port is None or parts.hostname else None
    except ValueError:
        return None


def _written(scheme: str, netloc: str, path: str, options: dict[str, str]) -> str:
    return f"{scheme}://{netloc}{path}" + (f"?{urlencode(options)}" if options else "")


def _number(database: str) -> str:
    if not (database.isascii() and database.isdigit()):
        raise ValueError("must name its database by a number, as in redis://host:port/0")
    return str(int(database))


def _with_credentials(netloc: str, options: dict[str, str]) -> str:
    """The credentials before the host, where redis-py and Celery both read them."""
    user, password = options.pop("username", ""), options.pop("password", None)
    if password is None or "@" in netloc:
        return netloc
    return f"{quote(user, safe='')}:{quote(password, safe='')}@{netloc}"


def _check(options: dict[str, str]) -> None:
    if not set(options) <= {*_OPTIONS, "db"}:
        raise ValueError(f"has an option that cannot be used; known are {', '.join(['db', *_OPTIONS])}")
    if options.get("ssl_cert_reqs", "none") not in _CERT_REQS:
        raise ValueError(f"has an ssl_cert_reqs that is none of {', '.join(_CERT_REQS)}")


def _is_host(url: str) -> bool:
    """Whether the host of a URL can be looked up. Python raises UnicodeError for other hosts, which no network error covers."""
    try:
        return bool((urlsplit(url).hostname or "localhost").encode("idna"))
    except ValueError:
        return False


def celery_url(url: str) -> str:
    """Celery's form of a URL that `redis_url` has returned, without the options at which Celery fails."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    if parts.scheme == "unix":
        place = {"virtual_host": options["db"]} if "db" in options else {}
        return _written("redis+socket", parts.netloc, parts.path, place)
    known = {name: value for name, value in options.items() if name.startswith(_SSL)}
    return _written(parts.scheme, parts.netloc, parts.path, known)
