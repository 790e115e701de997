"""What MkDocs calls while it builds the site: formulas become MathML, and no page may fetch anything."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

# With the mark that follows it, which is not to begin a line.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>([.,:;)]*)', flags=re.DOTALL)
# What a browser loads by itself. A link that somebody clicks is none.
LOADED = re.compile(
    r'<(?:script|img|iframe|source|link(?! rel="canonical"))\b[^>]*?(?:src|href)="((?:https?:)?//[^"]*)'
)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let a search for the words of a message find the page of errors first."""
    if page.file.src_uri == "errors.md":
        page.meta["search"] = {"boost": 4}
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Replace the formulas of a page, so that no script has to draw them in the browser."""
    return FORMULA.sub(_as_mathml, html)


def _as_mathml(formula: re.Match[str]) -> str:
    mathml = convert(unescape(formula[2]).strip(), display="block" if formula[1] == "div" else "inline")
    mathml = re.sub(r"(?<!<msub>)<mi>ln</mi>(?!<mo)", r'<mi>ln</mi><mspace width="0.17em"/>', mathml)
    mathml = mathml.replace("<mi>&#x000B1;</mi>", "<mo>&#x000B1;</mo>")  # With space on both sides.
    return f'<span style="white-space: nowrap">{mathml}{formula[3]}</span>' if formula[3] else mathml


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would load something from another host."""
    found = LOADED.findall(output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads {found[0]}; copy it into docs/.")
    return output
