"""Supervised fine-tuning with masks that are proven.

`prepare` turns rows into labelled tokens, `verify` checks the labels of any data set and reports what is wrong,
`Preparer` prepares batch by batch on Ray, Spark, Daft or `datasets.map`. Nothing but this package is needed; pyarrow,
datasets, transformers, trl and torch are used only when their objects are passed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._errors import (
    ConfigError,
    Error,
    FindingsError,
    InputError,
    InternalError,
    ModelError,
    RowError,
    SourceError,
)
from ._prepare import Prepared, prepare
from ._preparer import Preparer
from ._suasion import MASKING_VERSION, __version__
from ._verify import Finding, Row, Token, Verification, assert_masked, explain, verify

if TYPE_CHECKING:
    from ._callback import VerifyCallback

__all__ = [
    "MASKING_VERSION",
    "ConfigError",
    "Error",
    "Finding",
    "FindingsError",
    "InputError",
    "InternalError",
    "ModelError",
    "Prepared",
    "Preparer",
    "Row",
    "RowError",
    "SourceError",
    "Token",
    "Verification",
    "VerifyCallback",
    "__version__",
    "assert_masked",
    "explain",
    "prepare",
    "verify",
]


def __getattr__(name: str) -> Any:
    # A subclass of transformers.TrainerCallback: imported where it is used.
    if name == "VerifyCallback":
        from ._callback import VerifyCallback

        return VerifyCallback
    raise AttributeError(f"module 'suasion' has no attribute {name!r}")
