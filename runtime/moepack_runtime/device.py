"""What CUDA's libraries are told, and take, before an engine is opened on a device."""

from __future__ import annotations

import functools

import torch


@functools.cache
def prepare_device(device: torch.device) -> torch.cuda.Stream:
    """Set up what CUDA's libraries do in this process, before anything is counted; once.

    The matrix libraries take the workspaces that they keep, one for each stream that multiplies:
    the present one, and the one that steps are recorded on
    (:class:`moepack_runtime.token_graphs.TokenGraphs`), the same for all engines. And attention is
    not left to cuDNN, which makes a new plan, in 7 ms, for every length of the cache.

    Returns
    -------
    Stream
        The one to record on.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # of the process: torch knows no other
    recording = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    x = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    recording.wait_stream(torch.cuda.current_stream(device))
    for stream in (torch.cuda.current_stream(device), recording):
        with torch.cuda.stream(stream):
            torch.mm(x, x)
            torch.addmm(x[0], x, x)  # by another library
    torch.cuda.synchronize(device)
    return recording
