"""For mkdocstrings: cross-references written for Sphinx (``:class:`~a.B```) become links of the site's own kind."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|mod|data):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites the docstring of every object."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(_shown, obj.docstring.value)


def _shown(match: re.Match[str]) -> str:
    short, name = match.groups()
    name = name.lstrip(".")
    return f"`{name.rpartition('.')[2] if short else name}`"
