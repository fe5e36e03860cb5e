"""Prints the requirements of one image from pyproject.toml, so that they are installed before, and apart from, the code.

`control` is what the scaler and Flower need; `workers` is the extra of that name, with what writes Parquet.
"""

import sys
import tomllib
from pathlib import Path

CONTROL = ("flower", "prometheus-client")


def requirements(image: str, pyproject: Path) -> list[str]:
    """The requirement lines of `control` or `workers`. Raises KeyError for another image."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    if image == "workers":
        return [*project["dependencies"], *extras["workers"], *extras["parquet"]]
    if image == "control":
        optional = [line for extra in ("workers", "local") for line in extras[extra]]
        return project["dependencies"] + [line for line in optional if line.startswith(CONTROL)]
    raise KeyError(image)


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1], Path("pyproject.toml"))))
