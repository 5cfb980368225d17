"""`verify`: which tokens are supervised, why, and what is wrong with that."""

from __future__ import annotations

import html
import json
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from . import _suasion
from ._errors import FindingsError, InputError, ModelError
from ._inputs import Input, keys_of, model_of, rows_of, template_error
from ._progress import progress as _progress

#: Rows that a page shows, unless it is told others.
_SHOWN = 3


class Finding(NamedTuple):
    """What is wrong with a row, or worth knowing.

    Attributes
    ----------
    row : int
        The number of the row, from 0.
    code : str
        A stable code, such as ``M002``; docs/findings.md has a section for each.
    level : str
        ``error``, ``warning`` or ``note``.
    message : str
        What was found, with its values.
    """

    row: int
    code: str
    level: str
    message: str


class Token(NamedTuple):
    """A token of a row.

    Attributes
    ----------
    position : int
        Its place in the row.
    id : int
        Its id.
    text : str
        Its text; empty without a tokenizer.
    supervised : bool
        Whether its label is learned.
    weight : float
        Its loss weight: 0 where it is masked.
    origin : str
        What it is: ``response``, ``end_of_turn``, ``system``, ``user``, ``scaffold``, ...
    reason : str
        Why it is supervised or masked.
    """

    position: int
    id: int
    text: str
    supervised: bool
    weight: float
    origin: str
    reason: str


class Row:
    """A row, token by token. Its string is what ``suasion verify`` prints."""

    def __init__(self, inner: _suasion.Row) -> None:
        self._inner = inner

    @property
    def number(self) -> int:
        """The number of the row, from 0."""
        return self._inner.number

    @property
    def tokens(self) -> list[Token]:
        """Its tokens."""
        return [Token(*token) for token in self._inner.tokens]

    @property
    def learned(self) -> list[str]:
        """The text that is learned, a string for each run of tokens."""
        return self._inner.learned

    @property
    def findings(self) -> list[Finding]:
        """Its findings."""
        return [Finding(*finding) for finding in self._inner.findings]

    def to_text(self, color: bool = False, width: int = 100, ids: bool = False) -> str:
        """The row as the command line shows it; `ids` shows every token with its id."""
        return self._inner.text(color, width, ids)

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        tokens = self.tokens
        return f"Row({self.number}: {len(tokens)} tokens, {sum(t.supervised for t in tokens)} supervised)"

    def _repr_html_(self) -> str:
        style = {True: "background:#bfe8c9;color:#111", False: "opacity:.6"}
        parts = (
            f'<span style="{style[t.supervised]}" title="{html.escape(f"{t.position}: {t.id} {t.origin}: {t.reason}")}">'
            f"{html.escape(t.text or f' {t.id}')}</span>"
            for t in self.tokens
        )
        return f'<pre style="white-space:pre-wrap">{"".join(parts)}</pre>'


class Verification:
    """What was found in rows.

    Attributes
    ----------
    counts : dict
        How often each code was found.
    shares : dict
        For each section (``system``, ``user``, ``response``, ...) its tokens, and its share of the loss ``before``
        (on all tokens) and ``after`` masking.
    summary : dict
        The rows in numbers: rows, kept, tokens, supervised_tokens, targets, ...
    """

    def __init__(self, inner: _suasion.Verification, rows: Input) -> None:
        self._inner, self._rows = inner, rows
        self.counts: dict[str, int] = dict(inner.counts)
        self.shares: dict[str, dict[str, float]] = {
            name: {"tokens": tokens, "before": before, "after": after}
            for name, tokens, before, after in inner.sections
        }
        self.summary: dict[str, Any] = json.loads(inner.summary)

    @property
    def ok(self) -> bool:
        """False where a finding is an error that ``allow_findings`` does not name."""
        return self._inner.ok

    @property
    def findings(self) -> list[Finding]:
        """The findings, in the order of the rows."""
        return [Finding(*finding) for finding in self._inner.findings]

    @property
    def errors(self) -> list[Finding]:
        """The findings of level error that ``allow_findings`` does not name."""
        allowed = self._inner.allowed
        return [finding for finding in self.findings if finding.level == "error" and finding.code not in allowed]

    def row(self, number: int) -> Row:
        """A row, token by token.

        Raises
        ------
        RowError
            Where the row has no tokens: the reason.
        """
        return Row(self._inner.look(self._rows.one(number), number))

    def rows(self, numbers: Iterable[int] | None = None) -> list[Row]:
        """Some rows that have tokens: those of `numbers`, by default the first with errors, else the first."""
        if numbers is None:
            wrong = list(dict.fromkeys(finding.row for finding in self.errors))
            numbers = (wrong or list(range(self.summary["rows"])))[:_SHOWN]
        shown = []
        for number in numbers:
            try:
                shown.append(self.row(number))
            except Exception:  # A row without tokens is in the findings.
                continue
        return shown

    def to_text(self, color: bool = False, width: int = 100) -> str:
        """The summary as ``suasion verify`` prints it."""
        return self._inner.text(color, width)

    def to_sarif(self) -> dict[str, Any]:
        """The findings as SARIF 2.1.0, which code scanning services read."""
        log: dict[str, Any] = json.loads(self._inner.sarif())
        return log

    def to_html(self, rows: Iterable[int] | None = None) -> str:
        """A self-contained page with the summary and some rows, by default those of :meth:`rows`."""
        return self._inner.html([row._inner for row in self.rows(rows)])

    def raise_for_errors(self) -> None:
        """Raise :class:`FindingsError` where a finding is an error; it names codes, rows and messages."""
        errors = self.errors
        if not errors:
            return
        lines = []
        for code in dict.fromkeys(finding.code for finding in errors):
            of_code = [finding for finding in errors if finding.code == code]
            first = of_code[0]
            rows = len({finding.row for finding in of_code})
            where = f"row {first.row}" if rows == 1 else f"{rows} rows, the first is row {first.row}"
            lines.append(f"{code} in {where}: {first.message}")
        raise FindingsError(
            f"{self._inner.name}: rows with errors: " + "; ".join(lines),
            f"report.row({errors[0].row}) shows the row; docs/findings.md says what each code means",
            "E-FINDINGS",
        )

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        found = ", ".join(f"{code} × {n}" for code, n in self.counts.items()) or "nothing found"
        return f"Verification({self._inner.name}: {self.summary['rows']} rows, {'ok' if self.ok else 'errors'}: {found})"

    def _repr_html_(self) -> str:
        page = html.escape(self.to_html(), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:32rem;border:1px solid #8888"></iframe>'


def verify(
    x: Any,
    tokenizer: Any = None,
    template: str | None = None,
    *,
    source: Any = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    progress: bool | None = None,
    **keys: Any,
) -> Verification:
    """Look at every row: which tokens are supervised, why, and what is wrong with that.

    Parameters
    ----------
    x
        An ``SFTTrainer`` (the rows that it trains on), a ``datasets.Dataset`` or ``IterableDataset``, a batch of a
        ``DataLoader``, a path, or anything that :func:`prepare` takes. Rows may be raw, prepared by suasion, or
        tokenised by any program: ``input_ids`` with ``labels``, ``completion_mask`` or ``assistant_masks``.
    tokenizer
        A model folder, a hub id or a transformers tokenizer. It shows texts, and finds more: stop tokens that are
        masked, turns that are learned. Raw rows need it. A trainer brings its own.
    template : str, optional
        A chat template in place of the tokenizer's.
    source
        The rows that tokenised rows were made from, in any form that :func:`prepare` takes and in any order: their
        labels are derived again, and compared token by token. It needs the tokenizer.
    select, ignore : iterable of str
        Count only findings with these codes or prefixes, or all but these.
    progress : bool, optional
        Show progress. By default in notebooks and on terminals.
    **keys
        Keys of the configuration that say how labels should be, such as ``completion_only_loss=False``. Rows are cut to
        ``max_length`` (1,024 by default), but for those of a trainer and of a batch.

    Returns
    -------
    Verification

    Examples
    --------
    >>> import suasion
    >>> report = suasion.verify([{"input_ids": [12, 7, 31, 2], "labels": [-100, 31, 2, -100]}])
    >>> report.ok, report.findings[0].code
    (False, 'L001')
    >>> [token.supervised for token in report.row(0).tokens]
    [False, True, True, False]
    """
    if tokenizer is None:
        tokenizer = getattr(x, "processing_class", None)
    split = keys.get("dataset_train_split") or "train"
    if hasattr(x, "train_dataset") and hasattr(x, "args"):
        rows = trained_rows(x.train_dataset)
    else:
        rows = rows_of(x, split)
    if rows.final:
        keys.setdefault("max_length", None)
    model = None if tokenizer is None else _with_template(tokenizer, template)
    unusable = None if model is None else template_error(model)
    if unusable is not None:
        if template is not None:
            raise ModelError(f"template: {unusable}", "give a chat template in Jinja", "E-TEMPLATE")
        warnings.warn(f"the chat template is not used: {unusable}", stacklevel=2)
    if tokenizer is None and template is not None:
        raise InputError("a template without a tokenizer", "give tokenizer=.. too", "E-USAGE")
    again = [] if source is None else _twice(source, split)
    with _progress("verifying", rows.total, progress) as shown:
        inner, notes = _suasion.verify(
            rows.read(), again, model, keys_of(keys), _codes("select", select), _codes("ignore", ignore), shown
        )
    for note in notes:
        warnings.warn(note, stacklevel=2)
    if inner.no_turns is not None and source is None:
        warnings.warn(
            f"the turns of the chat template are not looked for in the ids: {inner.no_turns}; "
            "source=ROWS compares with the source rows",
            stacklevel=2,
        )
    return Verification(inner, rows)


def _codes(name: str, codes: Iterable[str]) -> list[str]:
    if isinstance(codes, str):
        # One code would be taken for its letters.
        codes = codes.split(",")
    listed = list(codes)
    for code in listed:
        if not isinstance(code, str):
            raise InputError(f"{name}: a {type(code).__name__}, not a code", f'give {name}=["T001"]', "E-USAGE")
    return listed


def _twice(source: Any, split: str) -> list[_suasion.Source]:
    """Source rows, to be read once for each boundary."""
    if isinstance(source, Iterator) and not hasattr(source, "__arrow_c_stream__"):
        source = list(source)
    rows = rows_of(source, split)
    if not rows.again:
        raise InputError(
            f"source: a {rows.name} can be read once, and source rows are read twice",
            "hand over a table, a list, a Dataset or a path",
            "E-USAGE",
        )
    return [rows.read(), rows.read()]


def _with_template(tokenizer: Any, template: str | None) -> _suasion.Model:
    if template is None:
        return model_of(tokenizer)
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory(prefix="suasion-tokenizer-") as folder:
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(folder)
        elif Path(tokenizer).is_dir():
            for name in Path(tokenizer).glob("*.json"):
                if not name.name.endswith(".index.json"):
                    shutil.copyfile(name, Path(folder) / name.name)
        else:
            raise InputError(
                "a template for a hub id", "give a folder or a transformers tokenizer with template=..", "E-USAGE"
            )
        (Path(folder) / "chat_template.jinja").write_text(template, encoding="utf-8")
        return model_of(folder)


def trained_rows(dataset: Any) -> Input:
    """The rows that a trainer has, with the labels that its collator gives them."""
    if dataset is None:
        raise InputError("the trainer has no train_dataset", "give it one, or hand over the rows themselves", "E-USAGE")
    columns = set(getattr(dataset, "column_names", None) or [])
    if columns and "input_ids" not in columns:
        raise InputError(
            f"the trainer's rows have no input_ids, but {', '.join(sorted(columns))}: its collator makes tokens of them",
            "hand over a batch, next(iter(trainer.get_train_dataloader())), or add suasion.VerifyCallback(), which sees them",
            "E-USAGE",
        )
    # Without labels and masks, collators learn every token.
    learned = bool(columns) and not columns & {"labels", "completion_mask", "assistant_masks"}
    rows = rows_of(dataset, learned=learned)
    rows.final = True
    return rows


def assert_masked(
    ds: Any,
    tokenizer: Any = None,
    ignore: Iterable[str] = (),
    **keys: Any,
) -> Verification:
    """Assert that no row has a finding of level error. For tests.

    Parameters
    ----------
    ds
        As in :func:`verify`.
    tokenizer
        As in :func:`verify`.
    ignore : iterable of str
        Codes or prefixes of findings that may be there.
    **keys
        As in :func:`verify`.

    Raises
    ------
    FindingsError
        An ``AssertionError`` whose text shows the first rows with errors, in colour where the terminal has it.

    Examples
    --------
    >>> import suasion
    >>> rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    >>> suasion.assert_masked(rows).ok
    True
    """
    __tracebackhide__ = True
    report = verify(ds, tokenizer, ignore=ignore, progress=False, **keys)
    if report.ok:
        return report
    color = sys.stderr.isatty()
    width = shutil.get_terminal_size((100, 24)).columns
    shown = "\n".join(row.to_text(color=color, width=width) for row in report.rows())
    try:
        report.raise_for_errors()
    except FindingsError as error:
        raise FindingsError(f"{error.message}\n\n{shown}", error.help, error.tag) from None
    return report


def explain(messages: Any, tokenizer: Any, **keys: Any) -> Row:
    """Show a single conversation, or a single row: which tokens are supervised, and why.

    Parameters
    ----------
    messages
        A list of messages (``role`` and ``content``), or a row of any format as a dictionary.
    tokenizer
        A model folder, a hub id or a transformers tokenizer.
    **keys
        Keys of the configuration.

    Returns
    -------
    Row

    Examples
    --------
    >>> import suasion
    >>> row = suasion.explain({"prompt": "[TASK] Say hello. [RESPONSE]", "completion": " Hello."}, DEMO)
    >>> "".join(token.text for token in row.tokens if token.origin == "response")
    ' Hello.'
    """
    if not isinstance(messages, (dict, list, tuple)):
        raise InputError(
            f"a {type(messages).__name__} is not a conversation",
            'give a list of messages, [{"role": "user", "content": ".."}, ..], or a row as a dictionary',
            "E-USAGE",
        )
    row = messages if isinstance(messages, dict) else {"messages": list(messages)}
    return Row(_suasion.look(rows_of([row]).read(), model_of(tokenizer), keys_of(keys), 0))
