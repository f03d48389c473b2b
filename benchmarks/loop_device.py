"""A read-only block device over a file, for its own amount of read-ahead.

Where a machine reads far ahead of what is asked for (megabytes), whoever maps a model reads most
of it in vain. A loop device reads as far ahead as is set for it alone, and nothing else of the
machine changes. It reads its file directly, so that no page is cached twice.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Self

from moepack.errors import MoepackError

READ_AHEAD_KIB = 128


class NoLoopDeviceError(MoepackError):
    """No loop device is to be had here."""


class LoopDevice:
    """The device, detached when the context ends.

    Raises
    ------
    NoLoopDeviceError
        When there is none to be had, or it would cache its file a second time.
    """

    def __init__(self, file: Path, read_ahead_kib: int = READ_AHEAD_KIB) -> None:
        if shutil.which("losetup") is None:
            raise NoLoopDeviceError("no losetup here; install util-linux")
        command = ["losetup", "--find", "--show", "--read-only", "--direct-io=on", str(file)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            raise NoLoopDeviceError(f"{found.stderr.strip()}; loop devices need root")
        self.path = Path(found.stdout.strip())
        self._settings = Path("/sys/block") / self.path.name
        try:
            if (self._settings / "loop" / "dio").read_text().strip() != "1":
                raise NoLoopDeviceError(f"{file}: its file system refuses to be read directly")
            (self._settings / "queue" / "read_ahead_kb").write_text(str(read_ahead_kib))
        except (OSError, NoLoopDeviceError):
            self.close()
            raise

    def close(self) -> None:
        """Detach it."""
        subprocess.run(["losetup", "--detach", str(self.path)], check=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
