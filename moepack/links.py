"""Links to throttle to: what ``--link`` can name."""

from __future__ import annotations

from pathlib import Path

from moepack import records
from moepack.atomic import write_atomically
from moepack.errors import ProfileError
from moepack.presets import resolve
from moepack.rates import require_positive
from moepack.records import record
from moepack.yaml_files import to_yaml_text

LINK_VERSION = 1

_HEADER = "# A link for --link: a transfer takes latency_s + bytes / rate_bytes_per_s.\n"


@record
class LinkPreset:
    """A serial link, one of whose transfers takes ``latency_s + bytes / rate_bytes_per_s``.

    Attributes
    ----------
    latency_s : float
        Of the link's time, for one transfer among others: where several are in flight at once,
        less than one alone waits.
    source : str
        Where the numbers come from.
    """

    version: int
    name: str
    rate_bytes_per_s: float
    latency_s: float
    source: str

    def __post_init__(self) -> None:
        require_positive(rate_bytes_per_s=self.rate_bytes_per_s)
        if not 0 <= self.latency_s < 1:
            raise ValueError(f"latency_s is {self.latency_s}, expected seconds, 0 to 1")

    def save(self, path: Path) -> None:
        """Write as YAML, atomically.

        Raises
        ------
        OutputError
            When it cannot be written.
        """
        text = _HEADER + to_yaml_text(records.to_data(self), flow=False)
        write_atomically(path, text.encode())


def load_link(path: Path) -> LinkPreset:
    """Read a link.

    Raises
    ------
    ProfileError
        When it cannot be read, or a field is wrong, naming it.
    """
    return records.load_yaml(
        LinkPreset,
        path,
        what="link",
        error=ProfileError,
        remedy="copy one with moepack preset copy",
        version=LINK_VERSION,
    )


def find_link(name_or_path: str) -> LinkPreset:
    """A preset by name, or a link by the path of its file.

    Raises
    ------
    PresetNotFoundError
        When it is neither.
    ProfileError
        When the file is not a link.
    """
    return load_link(resolve(name_or_path, "link"))
