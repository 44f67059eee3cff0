"""Progress on the terminal: a bar, or a line now and then where the output is a file."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from torch import Tensor

console = Console(stderr=True, highlight=False)
LINE_SECONDS = 15.0


class Progress:
    """Counts steps; `total` may be unknown.

    Args:
        label: what is being done.
        done: steps that a resumed run has behind it.
    """

    def __init__(self, label: str, total: int | None, done: int = 0) -> None:
        self.label, self.total, self.count = label, total, done
        self._bar: Bar | None = None
        self._said_at = time.monotonic()

    def __enter__(self) -> Progress:
        if console.is_terminal:
            columns = (
                TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            )  # fmt: skip
            self._bar = Bar(*columns, console=console)
            self._task = self._bar.add_task(
                self.label, total=self.total, completed=self.count, note=""
            )
            self._bar.start()
        return self

    def advance(self, note: str = "", loss: Tensor | None = None) -> None:
        """One step further; the loss is read, which waits for the device, only when shown."""
        self.count += 1
        now = time.monotonic()
        if self._bar is not None:
            self._bar.advance(self._task)
            if now - self._said_at > 0.5:
                self._bar.update(self._task, note=self._text(note, loss))
                self._said_at = now
        elif now - self._said_at > LINE_SECONDS:
            of = f"/{self.total}" if self.total else ""
            console.print(f"{self.label}: {self.count}{of} {self._text(note, loss)}")
            self._said_at = now

    def _text(self, note: str, loss: Tensor | None) -> str:
        return note if loss is None else f"{note} loss {loss.item():.3f}"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
