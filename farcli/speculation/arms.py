"""Ways to leap, by name: a predictor and how strongly it leaps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from farcli.artefact import build, load
from farcli.config import configure
from farcli.errors import UsageError
from farcli.forecasters.table import FORECASTERS
from farcli.registry import resolve, unknown
from farcli.speculation.base import Predictor
from farcli.speculation.predictors.forecast import Forecast
from farcli.speculation.table import PREDICTORS


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to leap."""

    name: str
    predictor: Predictor
    strength: float


def build_predictor(name: str, options: Mapping[str, str]) -> Predictor:
    """A predictor by its name in either table (or "package.module:Class", or FILE.safetensors), with options as typed.

    Raises:
        UsageError: there is none of that name, an option is unknown, or it would have to be fitted.
        StoreError: the file is missing or damaged.
    """
    if name.endswith(".safetensors"):
        if options:
            raise UsageError(f"--option {min(options)}: {name} is fitted already, and takes no options.")
        fitted = load(Path(name))
        return Forecast(name, fitted.forecaster, fitted=fitted)
    if name in FORECASTERS:
        own = dict(options)
        points = {key: own.pop(key) for key in ("points",) if key in own}
        return Forecast(name, build(name, own), configure(Forecast.Config, points, name).points)
    if name not in PREDICTORS and ":" not in name:
        raise unknown("predictor", name, [*PREDICTORS, *FORECASTERS])
    chosen = resolve("predictor", name, PREDICTORS)
    if not (isinstance(chosen, type) and issubclass(chosen, Predictor)):
        raise UsageError(f"predictor {name!r}: is {chosen!r}, expected a subclass of Predictor.")
    return chosen(configure(chosen.Config, options, name))


def arms_of(names: Sequence[str], strengths: Sequence[float], settings: Mapping[str, str]) -> list[Arm]:
    """One arm for each predictor and strength; where there are several, "no leap" first; none for "none".

    Raises:
        UsageError: a name is unknown, or an option belongs to no predictor.
    """
    if not names or not strengths:
        raise UsageError("leap: no predictor was given.")
    if list(names) == ["none"]:
        return []
    if len(names) == 1:
        made = [(names[0], build_predictor(names[0], settings), strength) for strength in strengths]
    else:
        made = []
        unused = set(settings)
        for name in names:
            known = _options_known(name, settings)
            unused -= known.keys()
            made += [(name, build_predictor(name, known), strength) for strength in strengths]
        if unused:
            raise UsageError(f"--option {min(unused)}: none of the predictors {', '.join(names)} has it.")
    arms = [Arm(*each) for each in made]
    return arms if len(arms) == 1 else [Arm("none", build_predictor("lookahead", {}), 0.0), *arms]


def _options_known(name: str, settings: Mapping[str, str]) -> dict[str, str]:
    """Those of the options that a predictor has."""
    known = {}
    for key, value in settings.items():
        try:
            build_predictor(name, {key: value})
        except UsageError:
            continue
        known[key] = value
    return known
