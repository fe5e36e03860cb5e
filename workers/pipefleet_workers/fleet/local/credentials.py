"""Generated credentials of one data directory, kept across restarts in a file for its owner alone.

`Stack` calls `load_or_create` with the file's path, and passes the credentials to the parts in a `Site`. A damaged file raises
StackError; a file that cannot be written raises OSError.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipefleet_workers.fleet.local.errors import StackError
from pipefleet_workers.fleet.local.files import write_private


@dataclass(frozen=True, repr=False)
class Credentials:
    """Every secret of a stack, in hexadecimal, so that no URL or env file needs to escape it.

    `s3_signing_key` signs requests between the parts of the S3 server; `flower_cookie_secret` signs the sessions of Flower.
    """

    redis_password: str
    s3_access_key: str
    s3_secret_key: str
    s3_signing_key: str
    flower_password: str
    flower_cookie_secret: str

    @classmethod
    def load_or_create(cls, path: Path) -> Credentials:
        """Read `path`, or generate and write it (0600).

        Raises StackError for a damaged file; deleting it makes new credentials for the old data.
        """
        if not path.exists():
            created = cls(**{field.name: secrets.token_hex(20) for field in fields(cls)})
            write_private(path, json.dumps(asdict(created), indent=1) + "\n")
            return created
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise StackError(f"{path} is damaged; delete it to generate new credentials") from error
