"""What Griffe calls when it has read a docstring of ours: it gets the form in which Griffe shows all its parts."""

from __future__ import annotations

import re
from textwrap import dedent, indent
from typing import Any

import griffe

# Sections that Griffe does not know would become boxes; and what stands before a colon in "Returns" would be a type.
OWN = "Shapes|Returns|Source|Values|Costs|Logged metrics"
BODY = r":\n((?:    .*(?:\n|\Z)|\n)+)"
PROMPT = re.compile(r"^>>> .*", flags=re.DOTALL | re.MULTILINE)


class Docstrings(griffe.Extension):
    """Makes paragraphs of sections of our own, and a section of the examples that end a docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of a module, class or function."""
        if obj.docstring is None:
            return
        text = re.sub(f"^({OWN}){BODY}", _as_text, obj.docstring.value, flags=re.MULTILINE)
        text = text.replace("Example::\n", "For example:\n")
        obj.docstring.value = PROMPT.sub(lambda found: "Examples:\n" + indent(found[0], "    "), text)


def _as_text(section: re.Match[str]) -> str:
    return f"**{section[1]}:**\n\n{dedent(section[2])}\n"
