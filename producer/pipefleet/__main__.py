"""`python -m pipefleet` runs the command `pipefleet`."""

from pipefleet.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
