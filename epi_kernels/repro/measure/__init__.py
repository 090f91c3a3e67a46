"""Measurements beside a training run, by name: what `Train.observe` holds.

An observer is asked for by its name, with options after a colon: "drift:every=25,ratios=0.01+0.1". Options change what
is recorded, so they are part of the run's description.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from pydantic import ValidationError

from epi_kernels.repro.config import Strict
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.stage import Stage

from .base import Observer, Probes
from .conflict import Conflict, ConflictOptions
from .curve import Curve, CurveOptions
from .drift import Drift, DriftOptions
from .stability import Stability, StabilityOptions


class Factory(NamedTuple):
    make: Callable[[Stage, Probes, Any], Observer]
    options: type[Strict]


OBSERVERS: dict[str, Factory] = {
    "curve": Factory(Curve, CurveOptions),
    "drift": Factory(Drift, DriftOptions),
    "conflict": Factory(Conflict, ConflictOptions),
    "stability": Factory(Stability, StabilityOptions),
}
ALWAYS = ("curve",)  # cheap enough for every run


class Asked(NamedTuple):
    name: str  # of OBSERVERS; the key in the manifest's series
    options: Any


def asked(text: str) -> Asked:
    """Reads "name" or "name:option=value,..."; several values are joined by "+". Raises ReproError."""
    name, _, rest = text.partition(":")
    if name not in OBSERVERS:
        raise ReproError(f"no observer is called {name!r}; there are {', '.join(OBSERVERS)}")
    given: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        option, equals, value = part.partition("=")
        if not equals or option in given:
            raise ReproError(f"observer {text!r}: {part!r} is not option=value, each option once")
        given[option] = value
    try:
        return Asked(name, OBSERVERS[name].options.model_validate(given))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        allowed = ", ".join(OBSERVERS[name].options.model_fields)
        raise ReproError(f"observer {text!r}: {wrong} (options: {allowed})") from None


def ask(name: str, **options: Any) -> str:
    """The text that `asked` reads; raises ReproError as it does."""
    values = {
        key: "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        for key, value in sorted(options.items())
        if value is not None
    }
    text = name + (":" + ",".join(f"{key}={value}" for key, value in values.items()) if values else "")
    asked(text)
    return text


def make_observer(text: str, stage: Stage, data: Probes) -> Observer:
    """The observer that `text` asks for, before the stage's first step. Raises ReproError."""
    name, options = asked(text)
    return OBSERVERS[name].make(stage, data, options)


def make_observers(texts: Iterable[str], stage: Stage, data: Probes) -> dict[str, Observer]:
    """Those asked for and those of every run, by name: the keys of the manifest's series. Raises ReproError."""
    texts = list(texts)
    names = [asked(text).name for text in texts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ReproError(f"observers asked for twice: {', '.join(twice)}; a run records each once")
    missing = [name for name in ALWAYS if name not in names]
    return {asked(text).name: make_observer(text, stage, data) for text in [*missing, *texts]}


__all__ = [
    "ALWAYS",
    "OBSERVERS",
    "Asked",
    "Factory",
    "Observer",
    "Probes",
    "ask",
    "asked",
    "make_observer",
    "make_observers",
]
