"""Settings that deploy/ and its README name exist: a misspelt variable would be passed over in silence."""

from __future__ import annotations

import re

from flower import options as _options  # noqa: F401 - defines Flower's options
from tornado.options import options

from pipefleet.settings import Settings
from pipefleet_workers.observe import logs
from pipefleet_workers.settings import WorkerSettings
from tests.deploy.project import PASSWORDS
from tests.deploy.tools import DEPLOY, ROOT

FILES = [ROOT / "docker-compose.yml", *(path for path in DEPLOY.rglob("*") if path.is_file())]
TEXT = "\n".join(path.read_text() for path in FILES if "__pycache__" not in path.parts)
OF_COMPOSE = set(re.findall(r"\$\{(PIPEFLEET_\w+)[:}]", TEXT))


def named(prefix: str) -> set[str]:
    return {name for name in re.findall(rf"\b({prefix}[A-Z0-9_]+)", TEXT)}


def test_settings_of_workers_and_producers_exist() -> None:
    workers = {f"PIPEFLEET_WORKER_{name.upper()}" for name in WorkerSettings.model_fields}
    producers = {f"PIPEFLEET_{name.upper()}" for name in Settings.model_fields}
    assert len(named("PIPEFLEET_WORKER_")) >= 5
    assert named("PIPEFLEET_") <= workers | producers | OF_COMPOSE | {logs.VARIABLE}


def test_passwords_that_compose_wants_are_in_the_example() -> None:
    wanted = set(re.findall(r"\$\{(\w+):\?", TEXT))
    assert wanted == set(PASSWORDS)


def test_options_of_flower_exist() -> None:
    named_options = {name.removeprefix("FLOWER_").lower() for name in named("FLOWER_")}
    assert {"basic_auth", "persistent", "read_only", "max_tasks"} <= named_options
    assert named_options <= set(options._options) | {name.replace("-", "_") for name in options._options}
