"""Build or check the tiny checkpoints: `python -m tests.checkpoints --check [KEY ...]`."""

import argparse
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import transformers as hf

from tests.checkpoints import CHECKPOINTS, build
from tests.checkpoints.check import check


def main() -> int:
    """Exit code 0, 1 when a checkpoint failed, 2 for wrong arguments."""
    options = _parse()
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    keys = options.keys or list(CHECKPOINTS)
    if options.check:
        return 1 if check(keys) else 0
    for key in keys:
        print(build(key, options.build / key.replace(":", "--")))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.checkpoints", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="run transformers' pipeline over each")
    action.add_argument("--build", type=Path, metavar="DIR", help="write each into a folder of DIR")
    parser.add_argument("keys", nargs="*", metavar="KEY", help="default: all")
    options = parser.parse_args()
    if unknown := [key for key in options.keys if key not in CHECKPOINTS]:
        parser.error(f"no checkpoint {', '.join(unknown)}; the keys are {', '.join(CHECKPOINTS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
