"""Names of parameters by their place in a tree."""

import jax


def path_name(path) -> str:
    """The path of a leaf as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
