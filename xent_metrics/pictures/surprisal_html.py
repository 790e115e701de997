"""The surprisal page as HTML: one file that asks for nothing, and says of each piece what it cost."""

from __future__ import annotations

from html import escape

from xent_metrics.page import Page, Piece, paragraphs
from xent_metrics.pictures.surprisal import is_dark, surprisal_colour

_STYLE = """
body { margin: 2em auto; max-width: 60em; padding: 0 1em; font: 16px/1.9 system-ui, sans-serif; color: #000 }
h1 { font-size: 1.1em }
h1, .scale, .about { line-height: 1.3 }
.about { color: #555 }
.scale span { padding: .2em .7em }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
.text { border-inline-start: 3px solid #bbb; padding-inline-start: .7em }
.text span { padding: .15em 0; position: relative }
.text i { border-inline-start: 3px solid #bbb; margin-inline: 1px }
.dark { color: #fff }
.text .empty { outline: 1px dotted #888; padding-inline: .2em }
.text span:hover { outline: 2px solid #000 }
.text span:hover::after {
  content: attr(data-about); position: absolute; left: 0; top: 2em; z-index: 1; width: max-content; max-width: 24em;
  padding: .3em .6em; border-radius: 4px; background: #222; color: #fff; font: 13px/1.5 monospace;
  white-space: pre-wrap; direction: ltr; text-align: left
}
"""
# Whatever the text holds, nothing is loaded and nothing runs.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_html(page: Page, title: str, most: float) -> str:
    """Return a page of HTML with every piece on a colour that says how many bits it cost; dark is hard.

    Args:
        page: The text. A paragraph goes from right to left if its script does; a bar stands where a sequence begins.
        title: Its heading.
        most: The bits from which on a piece has the darkest colour.
    """
    steps = [most * i / 5 for i in range(6)]
    scale = "".join(f"<span{_look(bits / most)}>{bits:.1f}</span>" for bits in steps)
    has_ranks = any(piece.ranks for sequence in page for piece in sequence)
    shown = "tokens, their bits, and their ranks (1: the most likely)" if has_ranks else "tokens and their bits"
    texts = "\n".join(_paragraph(paragraph, most) for paragraph in paragraphs(page))
    html = (
        f'<!DOCTYPE html>\n<html lang="und"><head><meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<style>{_STYLE}</style></head>\n<body>\n'
        f'<h1>{escape(title)}</h1>\n<p class="scale">{scale} bits</p>\n'
        f'<p class="about">Light was expected, dark was a surprise. Point at a piece for its {shown}.</p>\n'
        f"{texts}\n</body></html>\n"
    )
    return html.encode("utf-8", "backslashreplace").decode()  # A file cannot hold half a character.


def _paragraph(paragraph: Page, most: float) -> str:
    sequences = ("".join(_piece(piece, most) for piece in sequence) for sequence in paragraph)
    return f'<p class="text" dir="auto">{"<i></i>".join(sequences)}</p>'


def _piece(piece: Piece, most: float) -> str:
    several = "s" if len(piece.tokens) > 1 else ""
    lines = [
        f"token{several} {', '.join(map(str, piece.tokens))}: {piece.text!r}",
        f"{piece.bits:.2f} bits",
        *([f"rank {', '.join(map(str, piece.ranks))}"] if piece.ranks else []),
    ]
    about = "&#10;".join(escape(line) for line in lines)
    text = escape(piece.text).replace("\n", "⏎\n") or "∅"
    return f'<span{_look(piece.bits / most, is_empty=not piece.text)} data-about="{about}">{text}</span>'


def _look(share: float, is_empty: bool = False) -> str:
    """Return the attributes of a piece of a colour."""
    colour = surprisal_colour(share)
    classes = [*(["dark"] if is_dark(colour) else []), *(["empty"] if is_empty else [])]
    names = f' class="{" ".join(classes)}"' if classes else ""
    return f'{names} style="background:#{bytes(colour).hex()}"'
