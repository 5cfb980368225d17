"""Exceptions, with the text and the help of the command line."""

from __future__ import annotations


class Error(Exception):
    """What can go wrong.

    Attributes
    ----------
    message : str
        What is wrong, with its values.
    help : str or None
        What to do about it.
    tag : str
        The code that the command line prints, such as ``E-ROW``.
    """

    def __init__(self, message: str, help: str | None = None, tag: str = "E-INTERNAL") -> None:
        super().__init__(message, help, tag)
        self.message = message
        self.help = help
        self.tag = tag

    def __str__(self) -> str:
        return self.message if self.help is None else f"{self.message}\nhelp: {self.help}"


class ConfigError(Error, ValueError):
    """A keyword that is unknown, or has a value that it cannot have."""


class InputError(Error, TypeError):
    """Something else than rows, or rows of the wrong kind."""


class RowError(Error, ValueError):
    """A row that cannot become a sample."""


class SourceError(Error):
    """Rows that cannot be read."""


class ModelError(Error):
    """A model folder, a tokenizer or a chat template that cannot be used."""


class FindingsError(Error, AssertionError):
    """Findings of level error."""


class InternalError(Error, RuntimeError):
    """A bug in suasion."""


for _kind in (Error, ConfigError, InputError, RowError, SourceError, ModelError, FindingsError, InternalError):
    _kind.__module__ = "suasion"

_BY_TAG: dict[str, type[Error]] = {
    "E-CONFIG": ConfigError,
    "E-USAGE": InputError,
    "E-ROW": RowError,
    "E-SOURCE": SourceError,
    "E-IO": SourceError,
    "E-MODEL": ModelError,
    "E-TOKENIZER": ModelError,
    "E-TEMPLATE": ModelError,
    "E-FINDINGS": FindingsError,
    "E-MEMORY": Error,
}


def of_problem(tag: str, message: str, help: str | None) -> Error:
    """The exception for a problem of the library."""
    return _BY_TAG.get(tag, InternalError)(message, help, tag)
