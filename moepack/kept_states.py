"""Hidden states that wait in a file for those that they are compared with."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from moepack.atomic import output_error
from moepack.model_spec import DTYPE_BYTES, ModelSpec

if TYPE_CHECKING:
    import torch


class KeptStates:
    """Rows of [hidden] in the model's dtype, written in order and then read in order.

    The file has no name: it is gone with the process, however that ends.

    Parameters
    ----------
    folder
        Where it lies.

    Raises
    ------
    DiskFullError, ReadOnlyError, OutputError
        Here, or when writing, naming the folder.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self._folder = folder
        self._width = spec.hidden_size
        self._dtype = spec.dtype
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        except OSError as failure:
            raise output_error(folder, failure) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, rows: torch.Tensor) -> None:
        """Append [rows, hidden]."""
        import torch

        raw = rows.cpu().contiguous().view(torch.uint8).numpy()
        try:
            self._file.write(raw.data)
            self._file.flush()  # what does not fit is told here
        except OSError as failure:
            raise output_error(self._folder, failure) from None

    def rewind(self) -> None:
        """Begin to read."""
        self._file.seek(0)

    def read(self, rows: int, device: torch.device) -> torch.Tensor:
        """The next rows, [rows, hidden]."""
        import torch
        from moepack_runtime.weights import TORCH_DTYPE

        raw = torch.empty(rows * self._width * DTYPE_BYTES[self._dtype], dtype=torch.uint8)
        got = self._file.readinto(raw.numpy().data)
        assert got == raw.nbytes, f"{got} bytes kept, expected {raw.nbytes}"
        return raw.view(TORCH_DTYPE[self._dtype]).view(rows, self._width).to(device)
