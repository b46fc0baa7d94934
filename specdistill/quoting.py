"""Text of others (names, ids and categories of prompts) made safe for the place that shows it: a
terminal, Markdown, a picture. It may hold orders to a terminal, links, pictures or mathematics.
"""

from __future__ import annotations

import re
import unicodedata

# Control and format characters (bidirectional overrides among them), private and unassigned ones,
# lone surrogates, and the separators of lines and paragraphs.
_HIDDEN = frozenset({"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"})
GAP = " [...] "
_JOINERS = "\u200c\u200d"  # format characters that scripts and emoji need
_INTERVAL = r"\[[-–\d., ]+\](?![(\[:])"
_MARKS = re.compile(rf"({_INTERVAL})|([\\`*_\[\]<>|&~!#$]|:(?=//)|(?<=www)\.)|(@)", re.IGNORECASE)


def visible(text: str, keep: str = "") -> str:
    """With characters that would not show, or would give a terminal orders, as escapes; those in
    `keep` (a line break, say) stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or _shows(c) else _escape(c) for c in text)


def _shows(character: str) -> bool:
    return character in _JOINERS or unicodedata.category(character) not in _HIDDEN


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def code(text: str) -> str:
    """As code within a line of Markdown, in which nothing has a meaning; not in a table's cell."""
    text = visible(text)
    if not text.strip():
        return "–"
    ticks = "`" * (_longest_run(text) + 1)
    space = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def prose(text: str) -> str:
    """As words within a line of Markdown: no emphasis, link, picture, cell or HTML. Intervals such
    as [1.2, 3.4] stay as they are.
    """
    return _MARKS.sub(lambda m: m[1] or ("`@`" if m[3] else "\\" + m[2]), visible(text))


def block(text: str, language: str = "") -> str:
    """As a block of code, whatever backticks the text holds."""
    ticks = "`" * max(3, _longest_run(text) + 1)
    return f"{ticks}{language}\n{visible(text, keep=chr(10))}\n{ticks}"


def drawn(text: str, most: int = 80) -> str:
    """As matplotlib draws it: no mathematics, no name that a legend leaves out, and no longer than
    a picture is wide.
    """
    text = shortened(visible(text), most).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def shortened(text: str, most: int) -> str:
    """At most so many characters; the middle of longer texts is left out."""
    if len(text) <= most:
        return text
    half = (most - len(GAP)) // 2
    return f"{text[:half]}{GAP}{text[-half:]}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
