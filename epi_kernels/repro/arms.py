"""Arms: the rows of a comparison. Each is tuned by tries of its own, or like another arm but for what it states."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_serializer, model_validator

from epi_kernels.repro.config import Distinct, Strict
from epi_kernels.repro.methods.config import Method

Rate = Annotated[float, Field(gt=0)]
_METHOD: TypeAdapter[Any] = TypeAdapter(Method)
# Names of rows that tables have without an arm: one that is called so would stand in their place.
_ROWS = re.compile(r"(full SFT|WiSE-FT|multi-stage)(,.*)?|CPI-FT|before the second stage")


class Try(Strict):
    """One setting of a method; lr None is the recipe's."""

    method: Method
    lr: Rate | None = None


class Arm(Strict):
    """A row: the settings tried on the tuning seed, and which of them the table's seeds are run with.

    Or, with `like`, the chosen setting of another arm, whichever that is, but for the fields of the method in `but`:
    {name: random} is a random mask of that arm's ratio and interval at its learning rate. Nothing is tuned there.
    """

    tries: Annotated[tuple[Try, ...], Distinct] = ()
    chosen: Annotated[int, Field(ge=0)] = 0
    like: str | None = None
    but: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_of_two(self) -> Arm:
        if (self.like is None) != bool(self.tries):
            raise ValueError("an arm has either tries or another arm that it is like")
        if self.like is None and self.but:
            raise ValueError("but: without an arm that it is like")
        if self.like is not None and not self.but:
            raise ValueError(f"like {self.like} in everything: state under `but` what differs")
        if self.like is None and self.chosen >= len(self.tries):
            raise ValueError(f"chosen is {self.chosen}, there are {len(self.tries)} tries, counted from 0")
        return self

    @model_serializer(mode="wrap")
    def _as_stated(self, handler: Any) -> dict[str, Any]:
        record = handler(self)
        for name in ("like", "but") if self.like is None else ("tries", "chosen"):
            record.pop(name, None)
        return record

    @property
    def tuned(self) -> bool:
        """Whether it has tries of its own."""
        return self.like is None

    @property
    def settled(self) -> Try:
        return self.tries[self.chosen]


def _resolved(arms: dict[str, Arm]) -> dict[str, Arm]:
    """With the setting of every arm that is like another."""
    found = {}
    for name, arm in arms.items():
        if _ROWS.fullmatch(name):
            raise ValueError(f"{name}: a row of the tables has that name; call the arm otherwise")
        if arm.like is not None:
            model = arms.get(arm.like)
            if model is None or not model.tuned:
                raise ValueError(f"{name}: like {arm.like!r}, which is no arm with tries of its own here")
            try:
                arm = arm.model_copy(update={"tries": (_alike(model.settled, arm.but),)})
            except ValidationError as error:
                wrong = error.errors()[0]
                raise ValueError(f"{name}: but: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from None
        found[name] = arm
    return found


def _alike(one: Try, but: Mapping[str, Any]) -> Try:
    """The same rate and, as far as the method has them, the same settings. Raises ValueError."""
    given = one.method.model_dump()
    other = _METHOD.validate_python({"name": but.get("name", one.method.name)})
    shared = {field: value for field, value in given.items() if field in type(other).model_fields}
    return one.model_copy(update={"method": _METHOD.validate_python(shared | dict(but))})


Arms = Annotated[dict[str, Arm], AfterValidator(_resolved)]
