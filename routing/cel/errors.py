"""The two ways in which a filter goes wrong: its text is at fault, or one event does not suit it."""

from typing import Final

MAX_SHOWN_CHARACTERS: Final = 100


class FilterError(ValueError):
    """The text of a filter is at fault: found when it is compiled, never when an event is seen.

    `line` and `column` count from 1, in characters; `remedy` says what to write instead and may be empty.
    """

    def __init__(self, source: str, at: int, message: str, remedy: str = "") -> None:
        before = source[:at]
        self.message = message
        self.remedy = remedy
        self.line = before.count("\n") + 1
        self.column = at - (before.rfind("\n") + 1) + 1
        self.source = source
        super().__init__(message)

    @property
    def snippet(self) -> str:
        """The line at fault, cut to what fits a terminal, and a caret under the column."""
        text = self.source.split("\n")[self.line - 1]
        column = self.column - 1
        start = 0 if len(text) <= MAX_SHOWN_CHARACTERS else max(0, min(column - 60, len(text) - MAX_SHOWN_CHARACTERS))
        shown = text[start : start + MAX_SHOWN_CHARACTERS]
        # a control character would move the caret or the terminal
        clean = "".join(c if c.isprintable() else " " for c in shown)
        lead, tail = "…" if start else "", "…" if start + MAX_SHOWN_CHARACTERS < len(text) else ""
        return f"{lead}{clean}{tail}\n{' ' * (len(lead) + column - start)}^"

    def __str__(self) -> str:
        text = f"line {self.line}, column {self.column}: {self.message}\n{self.snippet}"
        return f"{text}\n{self.remedy}" if self.remedy else text

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.source, self.line, self.column, self.message, self.remedy))


def _rebuild(source: str, line: int, column: int, message: str, remedy: str) -> FilterError:
    at = sum(len(text) + 1 for text in source.split("\n")[: line - 1]) + column - 1
    return FilterError(source, at, message, remedy)


class FilterFault(ValueError):
    """An expression could not be evaluated on one event: the event does not match.

    The text names fields, operators and types, never a value: it goes to the trace and to logs.
    """
