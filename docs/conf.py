"""The site: `make docs` builds it, warnings being errors."""

import re

import qpde

project = "qpde"
author = "The qpde authors"
version = release = qpde.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

html_theme = "furo"
html_title = f"qpde {release}"
html_show_sphinx = False

# Pages with code cells are run; notebooks hold their outputs, which the tests keep true.
nb_execution_mode = "auto"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "undoc-members": True, "member-order": "bysource", "no-value": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autosummary_generate = False
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
copybutton_exclude = ".linenos, .gp, .go"

_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Example|Examples):$")


def restructured(lines: list[str]) -> list[str]:
    """A docstring of the house as reStructuredText.

    Docstrings are plain text: `name` is code, |x| a norm, and what is indented behind an empty line, such as a formula
    or a table, stands as it is.
    """
    made: list[str] = []
    kept = False  # within a block that stands as it is
    in_section = False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if _SECTION.match(line):
            in_section, kept = True, False
        elif line and not indent:
            in_section = kept = False
        behind_empty = not made or not made[-1].strip()
        if line.strip() and not in_section and indent and behind_empty and not kept:
            made += ["::", ""]
            kept = True
        if kept or line.lstrip().startswith((">>>", "...")) or (made and made[-1].lstrip().startswith(">>>")):
            made.append(line)
        else:
            made.append(_escaped(line))
    return made


def _escaped(line: str) -> str:
    """Signs that mean nothing in plain text; what stands between backticks is code."""
    parts = re.split(r"(``.+?``|`[^`]+`)", line)
    code = [f"``{part.strip('`')}``" if part.startswith("`") else None for part in parts]
    plain = [re.sub(r"([\\*|_])", r"\\\1", part) for part in parts]
    names = re.match(r"(\s+\w+): ", line)  # an argument's name keeps its underscores for napoleon
    text = "".join(found or part for found, part in zip(code, plain, strict=True))
    return line[: names.end()] + text[len(_escaped_name(names)) :] if names else text


def _escaped_name(names: re.Match) -> str:
    return re.sub(r"([\\*|_])", r"\\\1", names.group())


def setup(app):
    def process(app, what, name, obj, options, lines):
        lines[:] = restructured(lines)

    app.connect("autodoc-process-docstring", process, priority=100)  # before napoleon
