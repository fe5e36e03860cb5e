"""`python -m pipefleet` is the same command as `pipefleet`."""

from pipefleet.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
