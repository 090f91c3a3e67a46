"""Where a thing stands in a picture; see `pictured`."""

from __future__ import annotations

from .pictured import Pictured, Scene


class Places(Pictured):
    """A picture and "blue box=" -> "3"."""

    kind = "places"
    max_new_tokens = 2

    def ask(self, scene: Scene, place: str) -> tuple[str, str]:
        return f"{scene[place]}=", place
