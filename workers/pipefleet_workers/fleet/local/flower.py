"""Flower, the web page of the fleet's traffic, as a child process on loopback behind a password.

`Stack` starts it with the broker's URL, and waits until it answers. A missing free port, or a process that ends, raises StackError.
"""

from __future__ import annotations

import http.client
import sys
from collections.abc import Mapping

from pipefleet_workers.fleet.local.children import ChildSpec
from pipefleet_workers.fleet.local.part import ChildPart, Site
from pipefleet_workers.fleet.local.ports import LOOPBACK

USER = "pipefleet"
_SAVE_MILLISECONDS = 30_000


class Flower(ChildPart[Site]):
    """Flower for the Celery app at `app` (`package.module:attribute`), read-only, with its state on disk.

    `environment` is the child's; the broker's URL and the password are passed in it, not on the command line. Flower's own
    `/healthcheck` and `/metrics` answer without the password; every other page asks for it.
    """

    def __init__(self, site: Site, app: str, *, broker_url: str, environment: Mapping[str, str]) -> None:
        super().__init__("flower", site)
        self._app = app
        self._environment = {**environment, "CELERY_BROKER_URL": broker_url}
        self.port = 0

    @property
    def url(self) -> str:
        """`http://127.0.0.1:port/`, valid once started."""
        return f"http://{LOOPBACK}:{self.port}/"

    @property
    def password(self) -> str:
        """The password of the user `pipefleet`."""
        return self._site.credentials.flower_password

    def start(self) -> None:
        """Start the process without waiting for it."""
        folder = self._site.folder("flower")
        self.port = self._site.ports.take(["flower"])["flower"]
        self.child = self._site.children.start(
            ChildSpec(
                name=self.name,
                argv=[sys.executable, "-m", "celery", "-A", self._app, "flower"],
                cwd=folder,
                log=self._site.log(self.name),
                env=self._environment | self._options(),
                grace=2.0,
                keep=self._site.lock,
            )
        )

    def _options(self) -> dict[str, str]:
        credentials = self._site.credentials
        return {
            "FLOWER_ADDRESS": LOOPBACK,
            "FLOWER_PORT": str(self.port),
            "FLOWER_BASIC_AUTH": f"{USER}:{credentials.flower_password}",
            "FLOWER_COOKIE_SECRET": credentials.flower_cookie_secret,
            "FLOWER_READ_ONLY": "true",
            "FLOWER_PERSISTENT": "true",
            "FLOWER_DB": str(self._site.folder("flower") / "state"),
            "FLOWER_STATE_SAVE_INTERVAL": str(_SAVE_MILLISECONDS),
        }

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=2.0)
        try:
            connection.request("GET", "/healthcheck")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
