"""What rounding does to each expert, as measured, and what that does to the model.

The *error* of an expert in an encoding is what the output of its layer loses with only that expert
rounded, on calibration text: the mean over all tokens (those that do not use it count, with 0) of

    ||w (rounded(x) - expert(x))||^2 / ||h||^2

with ``w`` the router's weight and ``h`` the residual stream behind the layer, its output included:
the next norm divides by that, and a few tokens of most models are hundreds of times as large as
others. So it holds how often an expert is used, how strongly, on what, and how badly it takes
rounding.

Experts are rounded independently of each other, so their errors add up. What errors of a layer do
to the model's distribution is measured as well: the *divergence* (KL, see :mod:`moepack.quality`)
of the model in which the errors of all experts of this layer, and of nothing else, are added to its
output; once in its finest encoding, once in its coarsest. For small errors KL is a quadratic form
in them, so it grows along a line with their sum,

    divergence = floor + slope * (sum of errors)

The floor is there because no model is smooth: the least change makes some router choose otherwise,
or a number round to another. It is the same however many layers are changed, so divergences of
layers do not add up; their slopes do. Where all layers have their finest encoding, and where all
have their coarsest, is measured too: between these two the prediction for a choice is

    divergence = floor + scale * sum over layers of slope * (sum of the errors of what was chosen)

with the floor and the scale that give both. The floor is as often for the better as for the worse:
the loss on text grows by what is above it.

What rounding the trunk does is measured by itself, and added: its errors are independent of those
of the experts, and what is above the floor grows with their sum.

Source: the recipe is that of MC (Huang et al. 2024, arXiv:2410.06270), which weighs an expert's
error by powers of its frequency and weight; here both are inside the mean, and the layers are
weighed by a measurement.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moepack import records
from moepack.atomic import write_atomically
from moepack.errors import ProfileError
from moepack.records import added, record
from moepack.routing import TextSource

DAMAGE_VERSION = 1

#: The file in a model's folder.
DAMAGE_FILE = "damage.json"

_REMEDY = "make one with moepack profile --bits"

Floats = npt.NDArray[np.float64]


#: Noise may make a layer's slope vanish, or turn it round. It counts at least this share of what it
#: would without a floor.
_LEAST_SHARE = 0.1


@record
class LayerDamage:
    """One layer.

    Attributes
    ----------
    encodings : tuple of str
        What was tried, the finest first, the coarsest last.
    errors : tuple of tuple of float
        [encodings][experts]: the error of each, as the module says.
    output : float
        Mean over tokens of the squared norm of what all its routed experts add, as a share of the
        residual stream's.
    fine_divergence, coarse_divergence : float
        In nats a token, of the model with this layer in the first, and in the last, of
        ``encodings``.
    """

    layer: int
    encodings: tuple[str, ...]
    errors: tuple[tuple[float, ...], ...]
    output: float
    fine_divergence: float
    coarse_divergence: float

    def __post_init__(self) -> None:
        lengths = {len(column) for column in self.errors}
        if len(self.encodings) != len(self.errors) or not self.errors or len(lengths) != 1:
            raise ValueError(
                f"layer {self.layer}: errors of {len(self.errors)} encodings and {lengths} experts,"
                f" expected those of {len(self.encodings)} and of one number"
            )
        figures = (self.fine_divergence, self.coarse_divergence, self.output)
        _require_figures(f"layer {self.layer}", *figures, *sum(self.errors, ()))

    @property
    def totals(self) -> tuple[float, float]:
        """The errors of all experts in the finest encoding, and in the coarsest."""
        return math.fsum(self.errors[0]), math.fsum(self.errors[-1])

    @property
    def slope(self) -> float:
        """Nats a token for a unit of error, above the floor."""
        fine, coarse = self.totals
        if coarse <= 0:
            return 0.0
        least = self.coarse_divergence / coarse
        if coarse <= fine:
            return least
        rise = (self.coarse_divergence - self.fine_divergence) / (coarse - fine)
        return max(rise, _LEAST_SHARE * least)


def _require_figures(what: str, *figures: float) -> None:
    if not all(0 <= figure < math.inf for figure in figures):
        raise ValueError(f"{what}: a figure below 0 or not finite")


@record
class MissTrial:
    """What one rule for missing experts does if every expert is missing, for every token.

    Attributes
    ----------
    exact_up_to, low_up_to : float
        The rule; see :class:`moepack.plan.OnMiss`.
    saved : float
        Of the bytes of all experts that tokens use, the share that is not fetched.
    divergence : float
        In nats a token.
    """

    exact_up_to: float
    low_up_to: float
    saved: float
    divergence: float

    def __post_init__(self) -> None:
        _require_figures("a rule for misses", self.saved, self.divergence)


@record
class MissDamage:
    """The rules that were tried, with low copies in ``encoding``."""

    encoding: str
    trials: tuple[MissTrial, ...]

    def __post_init__(self) -> None:
        if not self.trials:
            raise ValueError("no rule for misses, expected one at least")


@record
class DamageProfile:
    """Every layer that has experts, and what it was measured on.

    Attributes
    ----------
    tokens : int
        On which errors were measured; of each expert at most ``sampled`` of its tokens.
    divergence_tokens : int
        On which divergences were measured.
    fine_divergence, coarse_divergence : float
        In nats a token, with every layer in its finest, and in its coarsest, encoding.
    calibration : str
        Digest of what rounding was weighed by (:mod:`moepack.calibration`); empty for nothing.
    misses : MissDamage or None
        What replacing missing experts does; None where it was not measured.
    trunk_divergence : float or None
        In nats a token, of the model with exact experts whose trunk's large matrices are INT8
        (:mod:`moepack.trunk`); None where it was not measured.
    """

    version: int
    model_name: str
    model_digest: str
    weights_digest: str
    recorded_utc: str
    tokens: int
    sampled: int
    divergence_tokens: int
    fine_divergence: float
    coarse_divergence: float
    sources: tuple[TextSource, ...]
    layers: tuple[LayerDamage, ...]
    calibration: str = added(default="")
    misses: MissDamage | None = added(default=None)
    trunk_divergence: float | None = added(default=None)

    def __post_init__(self) -> None:
        _require_figures("all layers", self.fine_divergence, self.coarse_divergence)
        _require_figures("the trunk", self.trunk_divergence or 0.0)

    @property
    def scale(self) -> float:
        """What the slopes of layers count for together."""
        fine, coarse = self._sums()
        if coarse <= fine:
            return 1.0
        return max((self.coarse_divergence - self.fine_divergence) / (coarse - fine), _LEAST_SHARE)

    @property
    def floor(self) -> float:
        """What any change at all comes to, nats a token."""
        return max(0.0, self.fine_divergence - self.scale * self._sums()[0])

    @property
    def trunk_cost(self) -> float:
        """What rounding the trunk adds to the floor, nats a token; 0 where it was not measured."""
        return max(0.0, (self.trunk_divergence or 0.0) - self.floor)

    def costs(self, layer: LayerDamage, names: tuple[str, ...]) -> Floats:
        """What each expert adds to the floor, [experts, names], nats a token.

        An encoding that was not tried, such as the model's own dtype, adds nothing.
        """
        errors = dict(zip(layer.encodings, layer.errors, strict=True))
        exact = (0.0,) * len(layer.errors[0])
        return layer.slope * self.scale * np.array([errors.get(name, exact) for name in names]).T

    def _sums(self) -> tuple[float, float]:
        """Over all layers, slopes times errors, in their finest and in their coarsest encoding."""
        fine = math.fsum(layer.slope * layer.totals[0] for layer in self.layers)
        return fine, math.fsum(layer.slope * layer.totals[1] for layer in self.layers)

    def save(self, folder: Path) -> None:
        """Write :data:`DAMAGE_FILE`, atomically."""
        write_atomically(folder / DAMAGE_FILE, records.encode(self).encode())


def load_damage(path: Path) -> DamageProfile:
    """Read what :meth:`DamageProfile.save` wrote.

    Parameters
    ----------
    path
        The file, or the folder that holds it.

    Raises
    ------
    ProfileError
        When it is missing, or is not what it should be.
    """
    what = f"damage profile {path}"
    try:
        text = (path / DAMAGE_FILE if path.is_dir() else path).read_bytes()
    except OSError as failure:
        raise ProfileError(f"{what}: {failure.strerror}; {_REMEDY}") from None
    version = records.Version(DAMAGE_VERSION, _REMEDY)
    return records.decode(DamageProfile, text, what=what, error=ProfileError, version=version)
