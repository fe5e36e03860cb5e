"""Settings of the producer, from the environment: every name starts with `PIPEFLEET_`.

boto3 reads the settings of S3 itself, under the standard `AWS_*` names (`AWS_ENDPOINT_URL_S3` for servers other than AWS).
Clients, the command line and workers call `load_settings`. UsageError names each wrong variable.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from pipefleet.contract.references import directory_uri
from pipefleet.errors import InputError, UsageError
from pipefleet.settings.redis_urls import redis_url

DEFAULT_FLEET = Path("fleet.toml")


class Settings(BaseSettings):
    """The settings of a producer. Immutable, so threads may share them."""

    model_config = SettingsConfigDict(env_prefix="PIPEFLEET_", frozen=True, extra="ignore", hide_input_in_errors=True)

    redis_url: str = Field(
        "redis://127.0.0.1:6379/0", description="redis:// or rediss:// URL of the broker", repr=False
    )
    store: str = Field("s3://pipefleet/store/", description="s3:// prefix for uploads and spilled results")
    fleet: Path | None = Field(None, description="fleet.toml; without it ./fleet.toml, then what workers announce")
    result_ttl: float = Field(86_400.0, gt=0, description="seconds for which the result of a single job is kept")
    run_ttl: float = Field(14 * 86_400.0, gt=0, description="seconds for which the progress of a run is kept")
    inline_bytes: int = Field(16_384, ge=0, le=49_152, description="largest input or result that travels in Redis")
    in_flight: int = Field(256, ge=1, description="inputs that a pipeline keeps under way for a generator")
    outstanding_shards: int = Field(2000, ge=1, description="shards of a run that are queued and not done, at most")
    redis_timeout: float = Field(10.0, gt=0, description="seconds to wait for one answer of Redis")

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, value: str) -> str:
        value = redis_url(value)
        if _host(value) is None:
            raise ValueError(
                "must be like redis://user:password@host:port/0; write '/', '?', '#' and '@' of a password as %2F, %3F, "
                "%23 and %40"
            )
        return value

    @field_validator("store")
    @classmethod
    def _store_prefix(cls, value: str) -> str:
        try:
            return directory_uri(value)
        except InputError as error:
            raise ValueError(str(error)) from None

    @property
    def fleet_path(self) -> Path | None:
        """The fleet file to read: the file of the setting `fleet`, or ./fleet.toml where it exists; else None."""
        return self.fleet or (DEFAULT_FLEET if DEFAULT_FLEET.is_file() else None)


def load_settings() -> Settings:
    """Settings from the environment. Raises UsageError, which names each wrong variable."""
    try:
        return Settings()
    except ValidationError as error:
        raise wrong_settings(error, "PIPEFLEET_") from None


def wrong_settings(error: ValidationError, prefix: str) -> UsageError:
    """One sentence for settings that are wrong, whose variables begin with `prefix`."""
    wrong = "; ".join(
        f"{prefix}{str(one['loc'][0]).upper()}: {one['msg'].removeprefix('Value error, ')}" for one in error.errors()
    )
    return UsageError(f"wrong setting: {wrong}")


def without_credentials(url: str) -> str:
    """`url` without user, password and query, for messages and logs. Of a malformed URL only the scheme stays."""
    scheme, separator, _ = url.partition("://")
    host = _host(url)
    return f"{scheme}://{'…' if host is None else host}" if separator else "…"


def _host(url: str) -> str | None:
    """Host, port and path of a URL, without user, password and query; None where the parts cannot be told apart."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return None
    local = parts.scheme == "unix" or not parts.netloc
    if not (host or local) or "@" in parts.path + parts.fragment or ("@" in parts.query and "@" not in parts.netloc):
        return None
    return (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "") + parts.path
