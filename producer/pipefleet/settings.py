"""Settings of the producer, from the environment: every name starts with `PIPEFLEET_`.

S3 access uses the standard `AWS_*` names (`AWS_ENDPOINT_URL_S3` for servers other than AWS), which boto3 reads itself.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from pipefleet.errors import InputError, UsageError
from pipefleet.storage import directory_uri

DEFAULT_FLEET = Path("fleet.toml")


class Settings(BaseSettings):
    """What a producer needs to know. Immutable, so it may be shared by threads."""

    model_config = SettingsConfigDict(env_prefix="PIPEFLEET_", frozen=True, extra="ignore")

    redis_url: str = Field("redis://127.0.0.1:6379/0", description="redis:// or rediss:// URL of the broker", repr=False)
    store: str = Field("s3://pipefleet/store/", description="s3:// prefix for uploads and spilled results")
    fleet: Path | None = Field(None, description="fleet.toml; without it ./fleet.toml, then what workers announce")
    result_ttl: float = Field(86_400.0, gt=0, description="seconds for which the result of a single job is kept")
    run_ttl: float = Field(14 * 86_400.0, gt=0, description="seconds for which the progress of a run is kept")
    inline_bytes: int = Field(16_384, ge=0, le=49_152, description="largest input or result that travels in Redis")
    in_flight: int = Field(256, ge=1, description="inputs that a pipeline keeps under way for a generator")
    redis_timeout: float = Field(10.0, gt=0, description="seconds to wait for one answer of Redis")

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, value: str) -> str:
        if urlsplit(value).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("must start with redis://, rediss:// or unix://")
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
        """The fleet file to read: the one that was named, or ./fleet.toml where there is one."""
        return self.fleet or (DEFAULT_FLEET if DEFAULT_FLEET.is_file() else None)


def load_settings() -> Settings:
    """Settings from the environment. Raises UsageError that names each wrong variable."""
    try:
        return Settings()
    except ValidationError as error:
        wrong = "; ".join(
            f"PIPEFLEET_{str(one['loc'][0]).upper()}: {one['msg'].removeprefix('Value error, ')}"
            for one in error.errors()
        )
        raise UsageError(f"wrong setting: {wrong}") from None


def without_credentials(url: str) -> str:
    """`url` with user and password taken out, for messages and logs."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{host}{port}{parts.path}"
