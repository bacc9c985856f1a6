"""Formulas in MathML, which browsers set as mathematics and screen readers speak.

A part of a formula is MathML, or plain text: letters are variables, digits numbers, everything else operators.
"""

import re
from html import escape

_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]|\S")


class Part(str):
    """A piece of MathML."""


def formula(*parts: str) -> str:
    """A line of mathematics of its own."""
    return f'<p class="formula"><math display="block">{_joined(parts)}</math></p>'


def row(*parts: str) -> Part:
    """Parts as one."""
    return Part(f"<mrow>{_joined(parts)}</mrow>")


def sub(base: str, index: str) -> Part:
    """The base with an index."""
    return Part(f"<msub>{row(base)}{row(index)}</msub>")


def sup(base: str, exponent: str) -> Part:
    """The base with an exponent."""
    return Part(f"<msup>{row(base)}{row(exponent)}</msup>")


def over(numerator: str, denominator: str) -> Part:
    """A fraction."""
    return Part(f"<mfrac>{row(numerator)}{row(denominator)}</mfrac>")


def root(*parts: str) -> Part:
    """A square root."""
    return Part(f"<msqrt>{_joined(parts)}</msqrt>")


def words(text: str) -> Part:
    """Plain words between the parts."""
    return Part(f"<mtext>&#160;{escape(text)}&#160;</mtext>")


def name(text: str) -> Part:
    """A name of several letters, upright: a function or a quantity."""
    return Part(f'<mi mathvariant="normal">{escape(text)}</mi>')


def _joined(parts) -> str:
    return "".join(part if isinstance(part, Part) else _tokens(part) for part in parts)


def _tokens(text: str) -> str:
    found = []
    for token in _TOKEN.findall(text):
        tag = "mn" if token[0].isdigit() else "mi" if token.isalpha() else "mo"
        found.append(f"<{tag}>{escape(token)}</{tag}>")
    return "".join(found)
