"""Functions that are given by their import path, as configurations have to."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any


def as_function(name: str, value: Any, what: str) -> Callable[..., Any] | None:
    """Return a function, or the one at an import path such as `"package.module.function"`; None for None.

    Args:
        name: The argument that has the value.
        value: A function, its import path, or None.
        what: What the function does, for the error.

    Raises:
        TypeError: If it is none of these.
        ValueError: If there is nothing at the path.
    """
    function = value
    if isinstance(value, str):
        try:
            function = pkgutil.resolve_name(value)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"`{name}` must {what}, got the import path {value!r}, where there is nothing: {error}; pass the "
                "function itself, or mend the path."
            ) from error
    if function is not None and not callable(function):
        raise TypeError(f"`{name}` must {what}, got {value!r}; pass a function or its import path.")
    return function  # type: ignore[no-any-return]
