"""Second moments of inputs: how the error of one rounded weight is made good by others.

With ``H`` the mean of x x^T over a text, rounding errors ``e`` of a row of weights change its
output by e^T H e in the mean, squared. Here ``H = M^T D M``, ``M`` with ones on its diagonal and
nothing above it, ``D`` diagonal, so that

    e^T H e  =  sum over i of D_i (e_i + sum over k < i of M_ik e_k)^2

Inputs that are rounded in their order therefore have a *target*, ``w_i + sum M_ik e_k``: the weight
and what it has to make good of the errors before it. How far its code is from that target is all
that counts, by ``D_i`` (:mod:`moepack.feedback`).

Few tokens leave ``H`` singular, and what they happen to have in common is not in other texts. So a
share of the mean of its diagonal is added to its diagonal: :data:`DAMPING`, and more where the
tokens are not many more than the inputs.

``M`` is kept in 16 bits: integers, times a power of two for each row. Sums of their products with
integers are exact, in any order, which is what makes codes the same on every machine. The factors
themselves come of LAPACK, whose last bits differ between machines: they are measured once, kept,
and named by the digest of the calibration that they belong to.

Where not all of ``H`` can be kept, blocks of neighbours along its diagonal are, of ``width``
inputs; errors are then made good inside a block only.

Source: E. Frantar et al., "GPTQ" (arXiv 2210.17323), in the form of J. Chee et al., "QuIP" (arXiv
2307.13304, section 4), where the same codes come of the factors of H instead of its inverse.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

#: Share of the mean of the diagonal that is added to the diagonal, for very many tokens.
DAMPING = 0.01

#: The largest coefficient that is kept, before its row's power of two.
_LARGEST = 32767

#: Powers of two of the rows of M.
_EXPONENTS = (-30, 15)

#: Bytes of a weight and an exponent.
_OF_AN_INPUT = 5


class Factor(NamedTuple):
    """``H`` of ``n`` inputs as the module says.

    Attributes
    ----------
    weights : array
        float32 [n]: ``D``, above 0, of mean 1 or so: only ratios matter.
    exponents : array
        int8 [n]: by which power of two a row of coefficients is multiplied.
    coefficients : array
        int16 [n / width, width * (width - 1) / 2]: of each block, the rows of M left of its
        diagonal, one after the other.
    """

    weights: npt.NDArray[np.float32]
    exponents: npt.NDArray[np.int8]
    coefficients: npt.NDArray[np.int16]

    @property
    def width(self) -> int:
        """Inputs of a block."""
        return len(self.weights) // len(self.coefficients)

    def dense(self) -> npt.NDArray[np.int16]:
        """The coefficients in their places, [n / width, width, width]; 0 elsewhere."""
        found = np.zeros((len(self.coefficients), self.width, self.width), np.int16)
        found[:, np.tri(self.width, k=-1, dtype=bool)] = self.coefficients
        return found

    def to_bytes(self) -> bytes:
        """One after the other, little-endian; :func:`factor_bytes` of them."""
        return b"".join(
            (
                self.weights.astype("<f4").tobytes(),
                self.exponents.tobytes(),
                self.coefficients.astype("<i2").tobytes(),
            )
        )


def factor_bytes(inputs: int, width: int) -> int:
    """What :meth:`Factor.to_bytes` takes."""
    return inputs * (_OF_AN_INPUT + width - 1)


def factor_from_bytes(content: bytes, inputs: int) -> Factor:
    """The reverse of :meth:`Factor.to_bytes`.

    Raises
    ------
    ValueError
        When it is none of so many inputs.
    """
    width = len(content) // inputs - _OF_AN_INPUT + 1
    if width < 1 or inputs % width or len(content) != factor_bytes(inputs, width):
        raise ValueError(f"{len(content)} bytes are no factor of {inputs} inputs")
    weights = np.frombuffer(content, "<f4", inputs).astype(np.float32)
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError("weights that are not above 0, or not finite")
    exponents = np.frombuffer(content, np.int8, inputs, 4 * inputs)
    low, high = _EXPONENTS
    if not ((exponents >= low) & (exponents <= high)).all():
        raise ValueError(f"powers of two beyond {low} to {high}")
    coefficients = np.frombuffer(content, "<i2", offset=_OF_AN_INPUT * inputs)
    return Factor(weights, exponents, coefficients.astype(np.int16).reshape(inputs // width, -1))


def factorised(blocks: Doubles, tokens: int) -> Factor:
    """Damp second moments and factorise them.

    Parameters
    ----------
    blocks
        [n / width, width, width]: the blocks of ``H``, symmetric and finite.
    tokens
        Of how many inputs they are the mean.

    Where all inputs were 0 errors count the same, and none makes good another.
    """
    count, width, _ = blocks.shape
    diagonal = np.einsum("bii->bi", blocks)
    mean = float(diagonal.mean())
    blocks = blocks / mean if mean > 0 else np.broadcast_to(np.eye(width), blocks.shape)
    damping = DAMPING * (1 + width / max(1, tokens))
    # What is left of the products' own rounding may be below 0 by more than that.
    while True:
        try:
            lower = np.linalg.cholesky((blocks + damping * np.eye(width))[:, ::-1, ::-1])
            break
        except np.linalg.LinAlgError:
            damping *= 4
    upper = lower[:, ::-1, ::-1]  # H = U U^T, so M is U^T with its rows divided
    roots = np.einsum("bii->bi", upper)
    rows = np.swapaxes(upper / roots[:, None, :], 1, 2) * np.tri(width, k=-1)
    largest = np.abs(rows).max(axis=2, initial=0.0)
    exponents = np.clip(np.frexp(largest)[1] - 15, *_EXPONENTS)
    integers = np.rint(np.ldexp(rows, -exponents[:, :, None]))
    integers = np.clip(integers, -_LARGEST, _LARGEST).astype(np.int16)
    below = np.tri(width, k=-1, dtype=bool)
    return Factor(
        np.square(roots).astype(np.float32).reshape(-1),
        exponents.astype(np.int8).reshape(-1),
        np.ascontiguousarray(integers[:, below].reshape(count, -1)),
    )
