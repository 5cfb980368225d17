"""What callers hand in, as rows that the library reads."""

from __future__ import annotations

import json
import operator
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from ._errors import InputError, ModelError, RowError
from ._suasion import Model, Source

#: Rows of Python objects that cross at once.
_ROWS = 256

#: Rows of a `datasets.Dataset` with an index that are gathered at once.
_GATHERED = 2000

#: Fields of a batch that say what is learned.
_DECIDE = ("labels", "attention_mask", "completion_mask", "assistant_masks", "weights", "loss_weights")


class Input:
    """Rows by a name, which may be read once or again.

    Attributes
    ----------
    name : str
        Their name in messages.
    total : int or None
        How many there are.
    final : bool
        They are what a model gets: nothing will cut them.
    """

    final = False

    def __init__(
        self,
        name: str,
        read: Callable[[], Source],
        total: int | None = None,
        one: Callable[[int], Source] | None = None,
        again: bool = True,
    ) -> None:
        self.name, self._read, self.total, self._one, self.again = name, read, total, one, again

    def read(self) -> Source:
        """All rows."""
        return self._read()

    def one(self, index: int) -> Source:
        """A source that has row `index`, perhaps after others."""
        index = operator.index(index)
        if index < 0:
            raise IndexError(f"{self.name}: rows are counted from 0, and there is no row {index}")
        if self.total is not None and not 0 <= index < self.total:
            raise IndexError(f"{self.name} has the rows 0 to {self.total - 1}, not {index}")
        if self._one is not None:
            return self._one(index)
        if not self.again:
            raise InputError(
                f"{self.name}: its rows were read, and cannot be read again",
                "hand over a list or a Dataset to look at single rows",
                "E-USAGE",
            )
        return self._read()


def rows_of(x: Any, split: str = "train", learned: bool = False) -> Input:
    """The rows of any object that has some. `learned`: those of a data set have their ids as labels."""
    kind = type(x)
    origin = kind.__module__.split(".")[0]
    label = kind.__name__
    if isinstance(x, (str, os.PathLike)):
        path = os.path.expanduser(os.fspath(x))
        return Input(path, lambda: Source.path(path, split))
    if isinstance(x, Input):
        return x
    if origin == "datasets":
        if label == "Dataset":
            return _dataset(x, learned)
        if label in ("DatasetDict", "IterableDatasetDict"):
            names = ", ".join(map(repr, x))
            raise InputError(
                f"a {label} has several splits: {names}", f"hand over one of them: rows[{next(iter(x), 'train')!r}]", "E-USAGE"
            )
        if label == "IterableDataset":
            return _iterable(x, learned)
    if hasattr(x, "__arrow_c_stream__"):
        return _arrow(x, label)
    if hasattr(x, "__arrow_c_array__"):
        return Input(label, lambda: Source.parts([x], label), getattr(x, "num_rows", None))
    if origin == "pyarrow" and hasattr(x, "to_reader"):
        return _arrow(x.to_reader(), label)
    if isinstance(x, Mapping) or label in ("BatchEncoding", "BatchFeature"):
        return _batch(x, label)
    if isinstance(x, (list, tuple)) and x and _is_arrow(x[0]):
        return Input(label, lambda: Source.parts(_packets(iter(x), label), label))
    if isinstance(x, (list, tuple)):
        return Input(
            label,
            lambda: Source.parts(_packets(iter(x), label), label),
            len(x),
            lambda i: Source.parts(_packets(iter(x[i : i + 1]), label, i), label, i),
        )
    if hasattr(x, "dataset") and hasattr(x, "collate_fn"):
        raise InputError(
            f"a {label} has batches, not rows",
            "hand over a batch, next(iter(loader)), or its data set, loader.dataset",
            "E-USAGE",
        )
    if hasattr(x, "__getitem__") and hasattr(x, "__len__") and not hasattr(x, "shape"):
        # torch's map-style data sets need not be iterable.
        return Input(
            label,
            lambda: Source.parts(_packets((x[i] for i in range(len(x))), label), label),
            len(x),
            lambda i: Source.parts(_packets(iter([x[i]]), label, i), label, i),
        )
    if isinstance(x, Iterable):
        again = not isinstance(x, Iterator)
        return Input(label, lambda: Source.parts(_packets(iter(x), label), label), again=again)
    raise InputError(
        f"{kind.__module__}.{label}: no rows",
        "hand over a path, a datasets.Dataset, a table (pyarrow, polars, pandas), or a list of dictionaries",
        "E-USAGE",
    )


def _arrow(x: Any, label: str) -> Input:
    # A reader is a stream that ends, and has no length; a table starts again.
    total = len(x) if hasattr(x, "__len__") else None
    again = total is not None
    return Input(label, lambda: Source.stream(x, label), total, again=again)


def _is_arrow(x: Any) -> bool:
    return hasattr(x, "__arrow_c_array__") or hasattr(x, "__arrow_c_stream__")


def _labelled(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "labels": row["input_ids"]}


def _dataset(x: Any, learned: bool) -> Input:
    """A `datasets.Dataset`: its table, through its indices, formatted columns only."""
    columns = x._format_columns
    if x._format_type == "custom":
        # A transform makes what a trainer sees: no table has it.
        def row(i: int) -> Any:
            return _labelled(x[i]) if learned else x[i]

        return Input(
            "Dataset",
            lambda: Source.parts(_packets((row(i) for i in range(len(x))), "Dataset"), "Dataset"),
            len(x),
            lambda i: Source.parts(_packets(iter([row(i)]), "Dataset", i), "Dataset", i),
        )
    plain = x.with_format("arrow", columns=columns)

    def whole(table: Any) -> Any:
        return table.append_column("labels", table["input_ids"]) if learned else table

    def table(start: int, end: int) -> Any:
        return whole(plain[start:end])

    def read() -> Source:
        if x._indices is None:
            # All rows in one stream, without a copy.
            rows = x.data.table
            if columns is not None and list(columns) != rows.column_names:
                rows = rows.select(list(columns))
            rows = whole(rows)
            return Source.stream(rows if hasattr(rows, "__arrow_c_stream__") else rows.to_reader(), "Dataset")
        return Source.parts((table(i, i + _GATHERED) for i in range(0, len(x), _GATHERED)), "Dataset")

    return Input("Dataset", read, len(x), lambda i: Source.parts(iter([table(i, i + 1)]), "Dataset", i))


def _iterable(x: Any, learned: bool) -> Input:
    label = "IterableDataset"

    def rows() -> Iterator[Any]:
        return map(_labelled, x) if learned else iter(x)

    return Input(label, lambda: Source.parts(_packets(rows(), label), label))


def _batch(x: Any, label: str) -> Input:
    """A batch as a collator makes it: an array per field, a row of it for each row."""
    batch = {name: _plain(value) for name, value in x.items() if value is not None}
    ids = batch.get("input_ids")
    if not isinstance(ids, list) or not ids or not isinstance(ids[0], list):
        raise InputError(
            f"a {label} without rows of \"input_ids\": it has {', '.join(map(str, x)) or 'nothing'}",
            "hand over a batch of a DataLoader, or rows as a list of dictionaries",
            "E-USAGE",
        )
    fields = {
        name: value
        for name, value in batch.items()
        if isinstance(value, list) and len(value) == len(ids) and all(isinstance(row, list) for row in value)
    }
    for name in _DECIDE:
        if name in batch and name not in fields:
            raise InputError(
                f'a {label} whose "{name}" does not have a row for each of the {len(ids)} of "input_ids"',
                "the fields of a batch are arrays of the same rows",
                "E-USAGE",
            )
    rows = [{name: value[i] for name, value in fields.items()} for i in range(len(ids))]
    made = Input(
        "batch",
        lambda: Source.parts(_packets(iter(rows), "batch"), "batch"),
        len(rows),
        lambda i: Source.parts(_packets(iter(rows[i : i + 1]), "batch", i), "batch", i),
    )
    made.final = True
    return made


def _plain(value: Any) -> Any:
    """Numbers and lists of tensors and arrays."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return value.tolist() if hasattr(value, "tolist") else value


def _default(value: Any) -> Any:
    plain = _plain(value)
    if plain is value:
        if hasattr(value, "isoformat"):
            return value.isoformat()
        raise TypeError(type(value).__name__)
    return plain


def _packets(rows: Iterable[Any], name: str, start: int = 0) -> Iterator[Any]:
    """Rows as JSON, some at once, and Arrow data among them as it is."""
    encode = json.JSONEncoder(ensure_ascii=False, default=_default).encode
    number, packet = start, list[bytes]()
    for row in rows:
        if not isinstance(row, dict):
            if _is_arrow(row):
                if packet:
                    yield packet
                yield row
                number, packet = number + len(row), []
                continue
            if hasattr(row, "items"):
                row = dict(row.items())
        try:
            text = encode(row)
        except (TypeError, ValueError, RecursionError) as error:
            raise RowError(
                f"{name}: row {number}: {_culprit(row, error)}",
                "a row has text, numbers, booleans, lists, dictionaries and None",
                "E-ROW",
            ) from None
        packet.append(text.encode("utf-8", "surrogatepass"))
        number += 1
        if len(packet) == _ROWS:
            yield packet
            packet = []
    if packet:
        yield packet


def _culprit(row: Any, error: Exception) -> str:
    """Which field of a row has no JSON form."""
    if isinstance(row, Mapping):
        for name, value in row.items():
            try:
                json.dumps(value, default=_default)
            except (TypeError, ValueError, RecursionError) as reason:
                kind = str(reason) if isinstance(reason, TypeError) else f"{type(value).__name__} ({reason})"
                return f"{name!r} holds a {kind}, which has no JSON form"
    return f"it holds a {error}, which has no JSON form"


def model_of(x: Any) -> Model:
    """A model folder: by path, by hub id, or what a transformers tokenizer saves."""
    if isinstance(x, Model):
        return x
    if isinstance(x, (str, os.PathLike)):
        return Model(os.path.expanduser(os.fspath(x)))
    # A processor has a tokenizer inside.
    tokenizer = getattr(x, "tokenizer", None) or x
    if not hasattr(tokenizer, "save_pretrained") or not hasattr(tokenizer, "backend_tokenizer"):
        raise ModelError(
            f"{type(x).__module__}.{type(x).__name__}: no tokenizer that can be used",
            "give a model folder, a hub id, or a transformers tokenizer with a tokenizer.json (a fast one)",
            "E-TOKENIZER",
        )
    folder = tempfile.mkdtemp(prefix="suasion-tokenizer-")
    try:
        tokenizer.save_pretrained(folder)
        # What a tokenizer does not know of its model: further stop tokens, sizes.
        known = Path(str(getattr(tokenizer, "name_or_path", "")))
        for name in ("generation_config.json", "config.json"):
            if (known / name).is_file():
                shutil.copyfile(known / name, Path(folder) / name)
        return Model(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def template_error(model: Model) -> str | None:
    """Why a model's chat template cannot be used, without the name of a deleted folder."""
    text = model.template_error
    return None if text is None else re.sub(r"^\S*suasion-tokenizer-\w+/chat_template\.jinja: ", "", text)


def keys_of(keys: dict[str, Any]) -> str:
    """Keywords as the JSON of a configuration file."""
    def plain(value: Any) -> Any:
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if isinstance(value, Enum):
            return value.value
        return _default(value)

    try:
        return json.dumps(keys, default=plain)
    except (TypeError, ValueError) as error:
        raise InputError(f"a keyword has a value of type {error}", "values are those of a configuration file", "E-USAGE") from None
