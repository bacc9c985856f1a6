"""What a person who misspelled a name may have meant."""

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "did you mean 'KNOWN'? ", ready to be followed by the whole list, or nothing where no name is near.

    Args:
      word: Name that does not exist.
      known: Names that do.
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""
