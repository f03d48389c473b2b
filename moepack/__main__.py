"""``python -m moepack``, and the ``moepack`` command: the process around one command line."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the process's command line. Returns the exit code."""
    try:
        # Inside: loading the commands takes long enough to be interrupted.
        from moepack.cli.app import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 128 + signal.SIGINT
    finally:
        # The result is out; what an interrupt could still do is to spoil the interpreter's end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
