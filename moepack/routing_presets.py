"""Which routing a plan is made with: recorded, or drawn from a preset."""

from __future__ import annotations

from pathlib import Path

from moepack.errors import ProfileError
from moepack.model_spec import ModelSpec
from moepack.presets import is_file_name, preset_path
from moepack.routing import RoutingProfile, load_routing, make_profile
from moepack.routing_model import RoutingModel, load_routing_model
from moepack.routing_sampler import sample_trace
from moepack.trace import LayerShape
from moepack.yaml_files import read_yaml

#: What is planned with where nothing is known: every expert equally likely.
UNIFORM = "uniform"

#: Of the profile that is drawn for a plan: (layer, token) events, tokens at the least and at the
#: most, and texts that they are split into. More tokens say more and take longer to plan with; from
#: the least on, hit rates hardly change. Several texts, because what is learnt from one text alone
#: is worth less on the next.
DEFAULT_EVENTS = 30_000
MIN_TOKENS = 320
MAX_TOKENS = 2048
DEFAULT_TEXTS = 4


def find_routing(name_or_path: str, spec: ModelSpec) -> RoutingProfile:
    """A recorded profile by its path, or one drawn from a preset, by name or path.

    Parameters
    ----------
    name_or_path
        Of a preset; or the path of one, of a recorded ``routing.yaml``, or of the folder in which
        that lies.

    Raises
    ------
    PresetNotFoundError
        When it is neither a file nor a preset.
    ProfileError
        When the file is not what it should be, naming what is wrong.
    """
    path = Path(name_or_path)
    if _is_folder(path):
        return load_routing(path)
    if not is_file_name(name_or_path):
        return synthetic_profile(load_routing_model(preset_path(name_or_path, "routing")), spec)
    remedy = "name a preset of moepack preset list, or record one with moepack profile"
    data = read_yaml(path, what=f"routing {path}", error=ProfileError, remedy=remedy)
    if isinstance(data, dict) and "trace_sha256" in data:
        return load_routing(path)
    return synthetic_profile(load_routing_model(path), spec)


def synthetic_profile(
    model: RoutingModel,
    spec: ModelSpec,
    *,
    tokens: int | None = None,
    texts: int = DEFAULT_TEXTS,
    seed: int = 0,
) -> RoutingProfile:
    """A routing profile of a model that was never run: drawn, and it says so.

    Parameters
    ----------
    tokens
        None: as many as the model's layers allow (:data:`DEFAULT_EVENTS`).
    """
    if tokens is None:
        tokens = min(MAX_TOKENS, max(MIN_TOKENS, DEFAULT_EVENTS // max(1, len(spec.moe_layers))))
    layers = [
        LayerShape(number, spec.moe(number).num_experts, spec.moe(number).top_k)
        for number in spec.moe_layers
    ]
    return make_profile(
        sample_trace(model, layers, tokens=tokens, sequences=texts, seed=seed),
        model_name=spec.name,
        model_digest=spec.digest,
        recorded_utc="",
        how=f"sampled from the routing preset {model.name}: {tokens} tokens, seed {seed}",
        sources=(),
        layers=tuple(layers),
    )


def is_sampled(profile: RoutingProfile) -> bool:
    """Whether a profile was drawn from a preset: it is an assumption, not a measurement."""
    return not profile.summary.sources


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # too long a name, for one
        return False
