"""``python -m fxq``: the command line of :mod:`fxq.cli`."""

from fxq.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
