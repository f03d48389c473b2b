"""``python -m moepack``."""

from __future__ import annotations

import sys

from moepack.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
