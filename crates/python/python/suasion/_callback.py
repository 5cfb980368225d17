"""`VerifyCallback`: the masks of a run, before and after collation."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback

from ._errors import Error, FindingsError, InputError
from ._verify import Verification, trained_rows, verify


class VerifyCallback(TrainerCallback):
    """Verifies what a ``Trainer`` or ``SFTTrainer`` learns.

    When training begins it looks at the whole data set, and then at the first batches that reach the model: collators
    break masks too.

    Parameters
    ----------
    on_error : {"raise", "warn"}
        What a finding of level error does.
    batches : int
        How many batches are looked at.
    ignore : iterable of str
        Codes or prefixes of findings that may be there.
    dataset : bool
        Whether the whole data set is looked at. A streaming data set never is.
    source
        The rows that the data set was made from, as in :func:`suasion.verify`: the whole data set is held against them.

    Attributes
    ----------
    reports : list of Verification
        What was found: in the data set, then in each batch.
    """

    def __init__(
        self,
        on_error: str = "raise",
        *,
        batches: int = 2,
        ignore: Iterable[str] = (),
        dataset: bool = True,
        source: Any = None,
    ) -> None:
        if on_error not in ("raise", "warn"):
            raise InputError(f"on_error={on_error!r}: expected raise or warn", 'give on_error="raise" or "warn"', "E-USAGE")
        self.on_error, self.batches, self.ignore, self.dataset = on_error, batches, tuple(ignore), dataset
        self.source = source
        self.reports: list[Verification] = []
        self._left = batches
        self._hook: Any = None
        self._tokenizer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from ._inputs import model_of

        tokenizer = kwargs.get("processing_class")
        try:
            # Saved once, for all batches.
            self._tokenizer = None if tokenizer is None else model_of(tokenizer)
        except Error:
            self._tokenizer = None
        loader, model = kwargs.get("train_dataloader"), kwargs.get("model")
        rows = getattr(loader, "dataset", None)
        # Rows that a collator makes tokens of are seen as batches only.
        tokens = "input_ids" in (getattr(rows, "column_names", None) or ["input_ids"])
        if self.dataset and tokens and hasattr(rows, "__len__"):
            report = verify(
                trained_rows(rows), self._tokenizer, source=self.source, ignore=self.ignore, progress=False
            )
            self._judge(report, "the data set")
        elif self.source is not None:
            warnings.warn("VerifyCallback: source is not used, since the whole data set is not looked at", stacklevel=2)
        self._left = self.batches
        if model is not None and self._left > 0:
            self._hook = model.register_forward_pre_hook(self._seen, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is not None and self._left == self.batches:
            warnings.warn("VerifyCallback: no batch with labels reached the model, so none was looked at", stacklevel=2)
        self._remove()

    def _remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _seen(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A batch as the model gets it."""
        if not module.training or kwargs.get("labels") is None or kwargs.get("input_ids") is None:
            return
        names = ("input_ids", "labels", "attention_mask", "position_ids")
        batch = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        self._left -= 1
        number = self.batches - self._left
        if self._left <= 0:
            self._remove()
        # The loss of a batch is over its targets; a row without any is the data set's finding.
        report = verify(batch, self._tokenizer, ignore=self.ignore, progress=False)
        self._judge(report, f"batch {number}, as the model gets it")

    def _judge(self, report: Verification, where: str) -> None:
        self.reports.append(report)
        try:
            report.raise_for_errors()
        except FindingsError as error:
            found = FindingsError(f"{where}: {error.message}", error.help, error.tag)
            if self.on_error == "raise":
                self._remove()
                raise found from None
            warnings.warn(str(found), stacklevel=2)
