"""`Preparer`: the preparation as a callable for engines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from . import _suasion
from ._errors import InputError
from ._inputs import keys_of, model_of

#: What decides a preparer: model, keys, whether texts are kept, the column that identifies rows and whether it is text.
_Made = tuple[str, str, bool, "str | None", bool]

#: The preparers of this process: a tokenizer is loaded once.
_LOADED: dict[_Made, _suasion.Preparer] = {}


class Preparer:
    """A callable that prepares rows batch by batch, for ``datasets.map``, Ray Data, Spark, Daft.

    It is picklable, and loads its tokenizer once in each process, when the first batch comes. A batch is prepared on
    the calling thread: engines run one task per core.

    Parameters
    ----------
    model : str or os.PathLike
        A model folder that every worker can read, or a hub id in every worker's cache.
    id : str, optional
        A column of the source that identifies its rows. It is kept, and names rows in errors.
    id_type : {"int64", "string"}
        The type of that column in the output.
    with_text : bool
        Add the rendered text of each row.
    **keys
        Keys of the configuration, as in :func:`suasion.prepare`. A batch does not know other rows: ``packing`` is
        refused here, and duplicates are not looked for. Both are a second pass over the prepared rows.

    Examples
    --------
    >>> import suasion, pyarrow as pa
    >>> f = suasion.Preparer(DEMO, id="n", max_length=512)
    >>> rows = pa.table({"n": [7], "prompt": ["[TASK] Say hello. [RESPONSE]"], "completion": [" Hello."]})
    >>> f(rows).column_names
    ['n', 'input_ids', 'labels', 'origins']
    >>> f.spark_schema
    '`n` bigint, `input_ids` array<int>, `labels` array<bigint>, `origins` string'
    """

    def __init__(
        self, model: Any, *, id: str | None = None, id_type: str = "int64", with_text: bool = False, **keys: Any
    ) -> None:
        if id_type not in ("int64", "string"):
            raise InputError(
                f"Preparer: id_type={id_type!r}: expected int64 or string", 'give id_type="int64" or id_type="string"', "E-USAGE"
            )
        if not isinstance(model, str):
            if not hasattr(model, "__fspath__"):
                raise InputError(
                    f"Preparer: a {type(model).__name__} as model: workers open a folder of their own",
                    "save the tokenizer with save_pretrained, and give the folder or a hub id",
                    "E-USAGE",
                )
            model = str(model)
        self._made: _Made = (model, keys_of(keys), with_text, id, id_type == "string")
        # Wrong keywords are reported here, not by a worker.
        self._inner  # noqa: B018

    @property
    def _inner(self) -> _suasion.Preparer:
        loaded = _LOADED.get(self._made)
        if loaded is None:
            model, keys, with_text, id, id_is_text = self._made
            loaded = _suasion.Preparer(model_of(model), keys, with_text, id, id_is_text)
            _LOADED[self._made] = loaded
        return loaded

    def __getstate__(self) -> _Made:
        return self._made

    def __setstate__(self, made: _Made) -> None:
        self._made = made

    def __call__(self, batch: Any) -> Any:
        """Prepare a ``pyarrow.Table`` or ``RecordBatch``, or a dictionary of columns: the result is of the same kind.

        An iterator of record batches becomes an iterator of prepared ones, as Spark's ``mapInArrow`` wants it.
        """
        import pyarrow as pa

        if isinstance(batch, pa.Table):
            return pa.table(self._inner.prepare(batch))
        if isinstance(batch, pa.RecordBatch):
            table = pa.table(self._inner.prepare(batch)).combine_chunks()
            batches = table.to_batches()
            return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
        if isinstance(batch, Mapping):
            # `datasets` hands over a mapping that converts columns when they are asked for.
            columns = {name: batch[name] for name in batch}
            return pa.table(self._inner.prepare(pa.table(columns))).to_pydict()
        if isinstance(batch, Iterator):
            return map(self, batch)
        raise InputError(
            f"Preparer: a {type(batch).__module__}.{type(batch).__name__} is not a batch",
            "give a pyarrow.Table, a pyarrow.RecordBatch, or a dictionary of columns (batch_format=\"pyarrow\" in Ray)",
            "E-USAGE",
        )

    @property
    def schema(self) -> Any:
        """The schema of the result, as a ``pyarrow.Schema``."""
        import pyarrow as pa

        return pa.table(self._inner.empty()).schema

    @property
    def spark_schema(self) -> str:
        """The schema of the result, as Spark writes it."""
        return self._inner.spark_schema

    def __repr__(self) -> str:
        model, keys, *_ = self._made
        return f"Preparer({model!r}, **{json.loads(keys)!r})"
