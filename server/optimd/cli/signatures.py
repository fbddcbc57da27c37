"""Commands whose flags are made rather than written out: typer reads a function's signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any


def own_parameters(command: Callable[..., None], *, without: str) -> list[inspect.Parameter]:
    """A command's parameters but for one, all by keyword."""
    return [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
        if name != without
    ]


def option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """A parameter for a flag. `annotation` is an `Annotated` with a `typer.Option`."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def with_parameters(
    function: Callable[..., None], command: Callable[..., None], parameters: Iterable[inspect.Parameter]
) -> Callable[..., None]:
    """Has typer take `function`, which takes whatever it is given by keyword, for a command with these parameters.

    Args:
        function: What is called. Changed in place, and returned.
        command: Whose name and text it has.
        parameters: What it takes.
    """
    signature = inspect.Signature(list(parameters))
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    function.__name__, function.__doc__ = command.__name__, command.__doc__
    return function
