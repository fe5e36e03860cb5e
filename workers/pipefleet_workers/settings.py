"""Settings of a worker, from environment variables that start with `PIPEFLEET_WORKER_`. The producer's settings apply as well."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from pipefleet.settings import wrong_settings


class WorkerSettings(BaseSettings):
    """Bounds and thread counts of one worker process. Immutable."""

    model_config = SettingsConfigDict(env_prefix="PIPEFLEET_WORKER_", frozen=True, extra="ignore")

    transport: Literal["lease", "stock"] = Field("lease", description="how messages are held: ours, or Celery's own")
    lease_seconds: float = Field(20.0, ge=1, description="seconds after which a dead worker's jobs run elsewhere")
    max_deliveries: int = Field(3, ge=1, description="how often a job may be delivered before it counts as deadly")
    prefetch: int = Field(512, ge=1, description="messages that the worker holds at once")
    shards: int = Field(8, ge=1, description="shards of bulk runs among them")
    retries: int = Field(6, ge=0, description="how often a job begins again because a service failed it alone")
    fetch_threads: int = Field(8, ge=1, description="objects that are downloaded at once")
    cpu_threads: int = Field(2, ge=1, description="threads that decode and preprocess")
    finish_threads: int = Field(1, ge=1, description="threads that postprocess")
    lanes: int = Field(
        0,
        ge=0,
        le=64,
        description="forwards that run at once on the device; 0 for the fastest number, measured at the start",
    )
    store_threads: int = Field(8, ge=1, description="results whose pictures, sound and arrays are stored at once")
    in_flight_items: int = Field(4096, ge=1, description="items inside the worker at once")
    in_flight_bytes: int = Field(
        512 << 20, ge=1, description="bytes inside the worker at once: of inputs, of what they decode to, of results"
    )
    window_units: int = Field(512, ge=1, description="preprocessed model inputs that wait for the device")
    max_object_bytes: int = Field(1 << 30, ge=1, description="largest object that is fetched")
    max_pixels: int = Field(100_000_000, ge=1, description="largest picture that is decoded")
    max_audio_seconds: float = Field(6 * 3600.0, gt=0, description="longest recording that is decoded")
    strict_media: bool = Field(
        False, description="refuse recordings and films that are damaged or lack their end, instead of warning of it"
    )
    max_video_frames: int = Field(100_000, ge=1, description="frames of a video that are decoded at most")
    max_whole_seconds: float = Field(
        600.0, gt=0, description="longest recording that a model without a window of its own hears in one piece"
    )
    max_whole_pixels: int = Field(
        16_000_000, ge=1, description="largest picture that a model gets at its own size, without being resized"
    )
    max_video_pixels: int = Field(
        100_000_000_000,
        ge=1,
        description="pixels of one video that are decoded at most, over all frames up to the last wanted",
    )
    max_text_bytes: int = Field(16 << 20, ge=1, description="longest text, and the texts inside one input together")
    max_whole_characters: int = Field(
        4 << 20,
        ge=1,
        description="characters of one input that are tokenised at once, at about 600 bytes of memory each",
    )
    max_tokens: int = Field(8192, ge=1, description="tokens of one text, where its model has no table of positions")
    allowed_uris: str = Field("s3://", description="comma-separated prefixes that inputs and outputs may lie under")
    drain_seconds: float = Field(5.0, ge=0, description="seconds that started work may take after SIGTERM")
    simulated_device: str = Field("", description="BASE,PER_COST in seconds: a forward takes at least this long")
    forward_timeout: float = Field(900.0, gt=0, description="seconds after which a forward counts as hung")
    stage_timeout: float = Field(
        900.0, ge=1, description="seconds after which decoding, preprocessing or postprocessing one item counts as hung"
    )
    warm_up: bool = Field(True, description="prove and measure batches before taking jobs")
    device_pictures: Literal["auto", "on", "off"] = Field(
        "auto", description="where pictures are resized: on the device (on), or only where that is a GPU (auto)"
    )
    onednn: Literal["auto", "off"] = Field(
        "auto", description="oneDNN multiplies the linear layers of a float32 model on a CPU, where it is faster (auto)"
    )
    continuous: Literal["auto", "on", "off"] = Field(
        "auto",
        description="requests of text-generation join and leave at every step: where proved (on), and where also no slower (auto)",
    )
    cache_bytes: int = Field(
        0,
        ge=0,
        description="bytes of the cache of their keys and values; 0 for enough for requests of 512 tokens",
    )
    preprocess_processes: int = Field(0, ge=0, description="processes that decode and preprocess; 0 for threads")
    metrics_port: int = Field(0, ge=0, le=65_535, description="port for Prometheus on loopback; 0 serves none")
    metrics_address: str = Field("127.0.0.1", description="address that the metrics are served on")
    trace: str = Field("", description="file that the spans of all stages are appended to")
    fleet_now: Path | None = Field(
        None, description="the fleet file that is edited, where the worker was started with a copy of it"
    )
    start_patience: float = Field(60.0, ge=0, description="seconds for which a worker that starts waits for Redis")
    announce_seconds: float = Field(10.0, gt=0, description="seconds between two announcements of the pool")


def load_worker_settings() -> WorkerSettings:
    """The settings of a worker from the environment. Raises UsageError, which names each wrong variable."""
    try:
        return WorkerSettings()
    except ValidationError as error:
        raise wrong_settings(error, "PIPEFLEET_WORKER_") from None
