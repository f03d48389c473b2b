"""One token's experts on a device, by kernels of our own: two launches for up to eight segments.

A launch costs the processor more than most of these kernels take the device, and torch wants one
for every product, activation and sum. The kernels (:mod:`moepack_runtime.fused_kernels`) take
segments by address, wherever they lie, and are launched by the handle of what was compiled, without
what Triton looks up before a launch.

They are for devices where :func:`moepack_runtime.fused_check.has_kernels`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from moepack.model_spec import ActivationSpec, MoeSpec
from moepack.segments import SegmentShape
from moepack_runtime.ffn import FfnWeights, QuantisedFfn, gated_ffn
from moepack_runtime.places import Form, form_of
from moepack_runtime.weights import TORCH_DTYPE

#: How many segments a launch takes.
SEGMENTS = 8

# Of a program: neurons, or outputs, that it computes; inputs that it takes at once, at most and at
# least where it can choose; columns that it adds up.
_NEURONS, _OUTPUTS = 4, 8
_WIDEST_STEP, _NARROWEST_STEP = 1024, 256
_COLUMNS = 256
_WARPS = 4


class Segment(NamedTuple):
    """A segment, and which of the token's rows it fills."""

    row: int
    weights: FfnWeights | QuantisedFfn


class TokenRows:
    """What each segment of one token's experts gives, and their sum.

    Parameters
    ----------
    x
        [1, hidden], contiguous, on a device that has the kernels.
    rows
        How many segments the token's experts have.

    Attributes
    ----------
    values : Tensor
        [rows, hidden] in the dtype of ``x``.
    """

    __slots__ = ("_activation", "_active", "_x", "values")

    def __init__(self, x: torch.Tensor, rows: int, activation: ActivationSpec) -> None:
        self._x = x
        self._activation = activation
        self._active = x.new_empty(0, dtype=torch.float32)
        self.values = x.new_empty(rows, x.shape[1])

    def compute(self, segments: Sequence[Segment]) -> None:
        """Fill the segments' rows. Which are handed over together changes no bit."""
        x = self._x
        for form, alike in by_form(segments):
            if form is None or not takes(form, x.dtype):
                for row, weights in alike:
                    self.values[row] = gated_ffn(x, weights, self._activation)[0]
                continue
            if self._active.numel() < SEGMENTS * form.neurons:
                self._active = x.new_empty(SEGMENTS * form.neurons, dtype=torch.float32)
            products = _products(form, self._activation, x.dtype, x.device)
            for first in range(0, len(alike), SEGMENTS):
                some = alike[first : first + SEGMENTS]
                addresses, rows = packed(some)
                active = self._active.data_ptr()
                products.first.launch(len(some), *addresses, x.data_ptr(), active)
                products.second.launch(len(some), *addresses, active, self.values.data_ptr(), *rows)

    def add_to(
        self, residual: torch.Tensor, shared: torch.Tensor | None, weights: torch.Tensor
    ) -> None:
        """Add the weighted sum of the rows, in their order and rounded once, to ``residual``.

        Parameters
        ----------
        residual
            [1, hidden], contiguous, in the dtype of the rows; in place.
        shared
            Like it: what the sum begins with.
        weights
            float32 [experts], contiguous: each that of equally many rows behind one another.
        """
        experts = weights.shape[0]
        kernel = _sum(
            self.values.shape, experts, shared is not None, residual.dtype, residual.device
        )
        beside = residual if shared is None else shared
        kernel.launch(
            1, residual.data_ptr(), beside.data_ptr(), self.values.data_ptr(), weights.data_ptr()
        )


def by_form(segments: Sequence[Segment]) -> list[tuple[Form | None, Sequence[Segment]]]:
    """Segments that one launch may take, together; None: those that no kernel reads."""
    found: dict[Form | None, list[Segment]] = {}
    for segment in segments:
        place = segment.weights.place
        found.setdefault(None if place is None else place.form, []).append(segment)
    return list(found.items())


def packed(segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    """The addresses and the rows of a launch: as many as it takes, the last of them idle."""
    addresses, rows = [], []
    for row, weights in segments:
        assert weights.place is not None, "a segment without an address"
        addresses.append(weights.place.address)
        rows.append(row)
    idle = SEGMENTS - len(rows)
    return addresses + addresses[:1] * idle, rows + rows[:1] * idle


def takes(form: Form, dtype: torch.dtype) -> bool:
    """Whether the kernels compute with a token of that dtype and such segments."""
    return not form.dtype or TORCH_DTYPE[form.dtype] is dtype


def prepare(
    shapes: Iterable[SegmentShape],
    moe: MoeSpec,
    dtype: torch.dtype,
    parts: int,
    device: torch.device,
) -> None:
    """Compile what a layer will need, before a token waits for it.

    Parameters
    ----------
    shapes
        Of the segments, as they lie in memory.
    parts
        How many an expert has.
    """
    for form in {form_of(shape) for shape in shapes}:
        if form is not None and takes(form, dtype):
            _products(form, moe.activation_spec, dtype, device)
            shared = moe.shared_intermediate_size > 0
            _sum((moe.top_k * parts, form.hidden), moe.top_k, shared, dtype, device)


class _Kernel:
    """A kernel that has been compiled, and its grid but for the segments."""

    def __init__(
        self,
        function: Any,
        arguments: Sequence[object],
        constants: dict[str, object],
        programs: int,
        device: torch.device,
    ) -> None:
        compiled = function.warmup(*arguments, **constants, grid=(1,), num_warps=_WARPS)
        self._run = compiled.run
        self._constants = tuple(constants.values())
        # The last three: metadata and hooks of profilers.
        self._handle = compiled.function, compiled.packed_metadata, None, None, None
        self._programs = programs
        self._stream = functools.partial(_driver().get_current_stream, device.index)

    def launch(self, segments: int, *arguments: int) -> None:
        """On the current stream; pointers by address."""
        self._run(
            self._programs, segments, 1, self._stream(), *self._handle, *arguments, *self._constants
        )


class _Products(NamedTuple):
    first: _Kernel
    second: _Kernel


@functools.cache
def _products(
    form: Form, activation: ActivationSpec, dtype: torch.dtype, device: torch.device
) -> _Products:
    """The two kernels for segments of a form."""
    kernels = _kernels()
    of_both = {
        "HIDDEN": form.hidden,
        "NEURONS": form.neurons,
        "CODES": form.codes,
        "GROUP": form.group,
        "DTYPE": _in_triton(dtype),
    }
    inner, outer = (
        {"MATRIX": matrix.codes, "SCALES": matrix.scales, "BIAS": matrix.bias}
        for matrix in (form.gate_up, form.down)
    )
    addresses = [torch.int8] * SEGMENTS
    first = _Kernel(
        kernels.first_products,
        [*addresses, dtype, torch.float32],
        {
            **of_both,
            **inner,
            "KIND": activation.kind,
            "ALPHA": activation.alpha,
            "LIMIT": activation.limit,
            "ROWS": _NEURONS,
            "STEP": step(form.hidden),
        },
        form.neurons // _NEURONS,
        device,
    )
    second = _Kernel(
        kernels.second_products,
        [*addresses, torch.float32, dtype, *range(SEGMENTS)],
        {**of_both, **outer, "ROWS": _OUTPUTS, "STEP": step(form.neurons)},
        form.hidden // _OUTPUTS,
        device,
    )
    return _Products(first, second)


@functools.cache
def _sum(
    shape: tuple[int, int], experts: int, shared: bool, dtype: torch.dtype, device: torch.device
) -> _Kernel:
    rows, hidden = shape
    return _Kernel(
        _kernels().add_rows,
        [dtype, dtype, dtype, torch.float32],
        {
            "HIDDEN": hidden,
            "EXPERTS": experts,
            "PARTS": rows // experts,
            "SHARED": shared,
            "WIDTH": _COLUMNS,
        },
        -(-hidden // _COLUMNS),
        device,
    )


def step(inputs: int) -> int:
    """Inputs that a program takes at once: a power of two, if possible a divisor of them all."""
    even = inputs & -inputs
    if even >= _NARROWEST_STEP:
        return min(even, _WIDEST_STEP)
    return min(_WIDEST_STEP, max(32, 1 << (inputs - 1).bit_length()))


def _kernels() -> ModuleType:
    from moepack_runtime import fused_kernels

    return fused_kernels


def _driver() -> Any:
    from triton.runtime import driver

    return driver.active


def _in_triton(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))
