"""`prepare`: rows to labelled tokens."""

from __future__ import annotations

import json
import operator
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, overload

from . import _suasion
from ._inputs import keys_of, model_of, rows_of, template_error
from ._progress import progress as _progress
from ._verify import Finding

if TYPE_CHECKING:
    import datasets
    import pyarrow


class Prepared:
    """Prepared rows: token ids, labels, and the origin of each token.

    It is a stream of Arrow data too (``__arrow_c_stream__``): ``polars.DataFrame(rows)`` and
    ``pyarrow.table(rows)`` take it as it is.

    Attributes
    ----------
    manifest : dict
        What the rows were made from: source, tokenizer, chat template, every choice that decided labels, counts, and
        a fingerprint over all of it.
    findings : list of Finding
        What is worth knowing about the rows, those that were left out among them.
    column_names : list of str
        The columns.
    """

    def __init__(self, inner: _suasion.Prepared) -> None:
        self._inner = inner
        self.manifest: dict[str, Any] = json.loads(inner.manifest)
        self.column_names: list[str] = inner.column_names

    @property
    def findings(self) -> list[Finding]:
        return [Finding(*finding) for finding in self._inner.findings]

    def __len__(self) -> int:
        return len(self._inner)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = operator.index(index)
        at = index + len(self) if index < 0 else index
        row = self._inner.row(at) if at >= 0 else None
        if row is None:
            raise IndexError(f"there are {len(self)} rows, and no row {index}")
        fields: dict[str, Any] = json.loads(row)
        return fields

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self._inner.stream().__arrow_c_stream__(requested_schema)

    def to_arrow(self) -> pyarrow.Table:
        """The rows as a ``pyarrow.Table`` that shares their memory."""
        import pyarrow

        return pyarrow.table(self)

    def to_datasets(self) -> datasets.Dataset:
        """The rows as a ``datasets.Dataset`` that shares their memory, which TRL trains on as it is."""
        import datasets

        table = datasets.table.InMemoryTable(self.to_arrow())
        return datasets.Dataset(table, fingerprint=self.manifest["fingerprint"][:16])

    def __repr__(self) -> str:
        counts = self.manifest["counts"]
        unit = "packs" if self.manifest.get("packs") else "rows"
        return (
            f"Prepared({len(self)} {unit} of {counts['rows']} rows, {counts['tokens']} tokens, "
            f"{counts['supervised_tokens']} supervised)"
        )


def prepare(
    rows: Any,
    model: Any,
    *,
    with_text: bool = False,
    progress: bool | None = None,
    **keys: Any,
) -> Prepared:
    """Render, tokenise, label and truncate rows, and pack them where that is wanted.

    Parameters
    ----------
    rows
        A path (file, glob, folder of splits, hub id), a ``datasets.Dataset`` or ``IterableDataset``, any object with
        Arrow data (pyarrow, polars, pandas, duckdb), a list of dictionaries, or an iterator of them. A row has any
        format of the command line: ``messages``, ``prompt`` and ``completion``, ShareGPT, Alpaca, tokens, ...
    model
        A model folder or a hub id, whose tokenizer and chat template are used, or a transformers tokenizer.
    with_text : bool
        Add the rendered text of each row.
    progress : bool, optional
        Show progress. By default in notebooks and on terminals.
    **keys
        Keys of the configuration by their names in TRL's ``SFTConfig``: ``max_length``, ``packing``,
        ``completion_only_loss``, ``truncation_mode``, ... (``suasion check --explain`` lists them).

    Returns
    -------
    Prepared
        The rows, in their order.

    Raises
    ------
    ConfigError
        A key that is unknown, with the nearest name, or has a value that it cannot have.
    RowError
        Rows that cannot become samples, all of the first twenty; ``on_bad_row="skip"`` leaves them out.
    SourceError, ModelError, InputError
        Rows or a model that cannot be read.

    Examples
    --------
    >>> import suasion
    >>> rows = [{"prompt": "[TASK] Say hello. [RESPONSE]", "completion": " Hello."}]
    >>> ds = suasion.prepare(rows, DEMO)
    >>> ds[0]["origins"]
    'BBBKKKKKKKBBBRRRRE'
    >>> [label for label in ds[0]["labels"] if label != -100] == ds[0]["input_ids"][-5:]
    True
    >>> suasion.prepare(rows, DEMO, max_lenght=512)
    Traceback (most recent call last):
    ...
    suasion.ConfigError: prepare: unknown key "max_lenght"
    help: did you mean "max_length"? `suasion check --explain` lists every key
    """
    source = rows_of(rows, keys.get("dataset_train_split") or "train")
    folder = model_of(model)
    with _progress("preparing", source.total, progress) as shown:
        inner, notes = _suasion.prepare(source.read(), folder, keys_of(keys), with_text, shown)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    unusable = template_error(folder)
    if unusable is not None:
        warnings.warn(f"the chat template is not used: {unusable}", stacklevel=2)
    prepared = Prepared(inner)
    date = prepared.manifest["policy"].get("template_date")
    if date is not None and keys.get("template_date") is None:
        warnings.warn(
            f"the chat template writes today's date into each conversation; pin it with template_date={date!r}",
            stacklevel=2,
        )
    return prepared
