"""In what experts are to be stored: the options that say it, and what they come to for a model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, NamedTuple, get_args

import typer

from moepack.cli.options import usage
from moepack.cli.output import note
from moepack.errors import ProfileError

if TYPE_CHECKING:
    from moepack.cli.planning import Case
    from moepack.damage import DamageProfile
    from moepack.layout import Layout
    from moepack.mixed_precision import MixedPrecision
    from moepack.plan_request import PlanRequest
    from moepack.precision import QualityName

#: Mean bits that can be asked for.
LEAST_BITS, MOST_BITS = 4.0, 16.0

_EXPECTED = "expected exact, int8, int4, or a bound on the growth of perplexity as in 0.5%"


class Quality(NamedTuple):
    """What ``--quality`` says: a name, or by how many percent perplexity may grow."""

    name: QualityName | None
    percent: float | None = None


@usage
def quality(text: str) -> Quality:
    """A name, or ``0.5%``."""
    from moepack.precision import QualityName

    for name in get_args(QualityName):
        if text == name:
            return Quality(name)
    number, sign, rest = text.partition("%")
    try:
        percent = float(number)
    except ValueError:
        percent = math.nan
    if not sign or rest or not 0 <= percent < math.inf:
        raise ValueError(f"{text!r}: {_EXPECTED}")
    return Quality(None, percent)


@usage
def mean_bits(text: str) -> float:
    """A number of bits."""
    try:
        bits = float(text)
    except ValueError:
        bits = math.nan
    if not LEAST_BITS <= bits <= MOST_BITS:
        raise ValueError(f"{text!r}: expected a number from {LEAST_BITS:g} to {MOST_BITS:g}")
    return bits


QualityOption = Annotated[
    Quality | None,
    typer.Option(
        "--quality",
        parser=quality,
        metavar="exact|int8|int4|PCT%",
        help="In what routed experts are stored: exact is the model's own dtype, the next two "
        "round them all. With a percentage, as in 0.5%, each gets the precision with which all "
        "together are smallest, and perplexity is predicted to grow by so much at the most: from "
        "what moepack profile --bits has measured. Default: exact; with --keep-layout, what the "
        "pack has.",
        show_default=False,
    ),
]
BitsOption = Annotated[
    float | None,
    typer.Option(
        "--bits",
        parser=mean_bits,
        metavar="MEAN",
        help="Give each routed expert the precision with which all together do least damage, "
        "within a mean number of bits for each weight, 4 to 16, scales counted: from what moepack "
        "profile --bits has measured.",
        show_default=False,
    ),
]


@usage
def trunk_precision(text: str) -> str:
    """What the trunk is to be stored in, as layouts spell it."""
    from moepack.trunk import TRUNK_ENCODINGS, trunk_name

    spelled = {trunk_name(encoding): encoding for encoding in TRUNK_ENCODINGS}
    if text not in spelled:
        raise ValueError(f"{text!r}: expected {' or '.join(spelled)}")
    return spelled[text]


TrunkOption = Annotated[
    str | None,
    typer.Option(
        "--trunk",
        parser=trunk_precision,
        metavar="exact|int8",
        help="In what everything but the routed experts is stored: exact is the checkpoint's own "
        "dtype; int8, which is lossy, rounds the large matrices of attention, of dense and shared "
        "FFNs, of head and embedding. Routers, norms and what is small stay exact. Default: exact; "
        "with --keep-layout, what the pack has.",
        show_default=False,
    ),
]


def asked_trunk(case: Case, trunk: str | None, quality: Quality | None, kept: Layout | None) -> str:
    """What the trunk is to be stored in (:mod:`moepack.trunk`).

    Raises
    ------
    ProfileError
        When perplexity is bounded, and what rounding the trunk does to it has not been measured.
    """
    from moepack.trunk import trunk_name

    if kept is not None:
        if trunk is not None and trunk != kept.trunk:
            raise typer.BadParameter(
                f"the trunk of the pack whose layout is kept is {trunk_name(kept.trunk)}; leave "
                "out one of the two",
                param_hint="'--trunk'",
            )
        return kept.trunk
    if trunk and quality is not None and quality.percent is not None:
        damage = measured_damage(case)
        if damage is not None and damage.trunk_divergence is None:
            raise ProfileError(
                f"what rounding the trunk of {case.source.record.name} does has not been measured "
                f"here, so a bound of {quality.percent:g}% cannot be kept with --trunk "
                f"{trunk_name(trunk)}; run moepack profile --bits"
            )
    return trunk or ""


class AskedPrecision(NamedTuple):
    """What experts are to be stored in: see :class:`moepack.plan_request.PlanRequest`."""

    encoding: str | None = None
    by_expert: tuple[tuple[str, ...], ...] = ()


def asked_precision(
    case: Case,
    quality: Quality | None,
    bits: float | None,
    kept: Layout | None,
    *,
    low: bool,
    trunk: str = "",
) -> AskedPrecision:
    """What experts are to be stored in; nothing: as in the layout that is kept, or the model.

    Parameters
    ----------
    low
        Whether low copies are wanted as well.
    trunk
        What the trunk is stored in: what that costs leaves less for experts.

    Raises
    ------
    GroupMismatchError
        When the model's experts cannot be stored so.
    ProfileError
        When damage is needed, and has not been measured.
    PlanError
        When no encoding that fits has so few bits.
    """
    from moepack.precision import encoding_of, precision_of

    chosen = _chosen_by_damage(quality, bits)
    if chosen is None:
        name = None if quality is None else quality.name
        if name is None:
            return AskedPrecision()
        if kept is not None:
            has = precision_of(case.source.spec, kept).quality
            if has != name:
                raise typer.BadParameter(
                    f"the pack whose layout is kept is {has}; leave out one of the two",
                    param_hint="'--quality'",
                )
        return AskedPrecision(encoding_of(case.source.spec, name))
    if kept is not None:
        raise typer.BadParameter(
            "the pack whose layout is kept has its precision; leave out one of the two",
            param_hint=f"'{chosen}'",
        )
    if low:
        raise typer.BadParameter(
            "low copies are of experts that are stored alike; leave out --on-miss, or choose "
            "--quality exact or int8",
            param_hint=f"'{chosen}'",
        )
    return AskedPrecision(by_expert=_best(case, quality, bits, trunk).encodings)


def require_bounded(case: Case, quality: Quality | None, request: PlanRequest) -> None:
    """That a bound on perplexity holds for experts rounded as they are asked for."""
    if quality is None or quality.percent is None or not request.is_rounded:
        return
    damage = measured_damage(case)
    if damage is not None and damage.calibration != request.calibration:
        raise typer.BadParameter(
            f"a bound of {quality.percent:g}% holds for experts that are rounded as they were when "
            "damage was measured, by their calibration; leave out --no-calibration, give --bits, "
            "or measure again with moepack profile --bits",
            param_hint="'--quality'",
        )


def measured_damage(case: Case) -> DamageProfile | None:
    """What rounding does to the model's experts; None where it has not been measured."""
    from moepack.damage import DAMAGE_FILE, load_damage

    if case.folder is None or not (case.folder.folder / DAMAGE_FILE).exists():
        return None
    return load_damage(case.folder.folder)


def _chosen_by_damage(quality: Quality | None, bits: float | None) -> str | None:
    """The option by which each expert's precision is to be chosen, if any is."""
    if bits is None:
        return "--quality" if quality is not None and quality.percent is not None else None
    if quality is not None:
        raise typer.BadParameter(
            "both say in what experts are stored; leave out --bits or --quality",
            param_hint="'--bits'",
        )
    return "--bits"


def _best(case: Case, quality: Quality | None, bits: float | None, trunk: str) -> MixedPrecision:
    from moepack.mixed_precision import at_mean_bits, within_perplexity

    spec, damage = case.source.spec, measured_damage(case)
    if damage is None:
        raise ProfileError(
            f"what rounding does to the experts of {case.source.record.name} has not been measured "
            "here, and the precision of each is chosen by that; run moepack profile --bits"
        )
    if bits is not None:
        return at_mean_bits(spec, damage, bits)
    assert quality is not None, "neither bits nor a bound"
    assert quality.percent is not None, "neither bits nor a bound"
    found = within_perplexity(
        spec, damage, quality.percent, spent=damage.trunk_cost if trunk else 0.0
    )
    if all(name == spec.dtype for names in found.encodings for name in names):
        note(
            f"within {quality.percent:g}% no expert can be rounded: the plan is of the exact model"
        )
    return found
