"""Regular expressions, in the syntax that the language names (RE2), on RE2 itself: linear time, whatever the pattern.

Owns every bound on patterns. What a pattern may cost is known before it runs: RE2 takes at most about four nanoseconds
for each byte of the text and each instruction of the pattern's program, and the bounds on a program are bounds on the
time to compile it.
"""

import re
from functools import lru_cache
from typing import Any, Final

import re2
from msgspec import Struct

from routing.cel.errors import FilterFault
from routing.cel.values import Scope, spend

MAX_PATTERN_CHARACTERS: Final = 500
# instructions in the patterns of one filter together, an escaped class of Unicode counted besides: 0.1 us each
MAX_INSTRUCTIONS: Final = 2_000
# \p{Greek} makes RE2 go through tables, also where hardly an instruction comes of it
_UNICODE_CLASS: Final = re.compile(r"\\[pP]")
_UNICODE_CLASS_COST: Final = 500
# what RE2 may take for a pattern: its program, and the states that it keeps from match to match
_MAX_BYTES: Final = 1 << 17
_REFUSED_STEPS: Final = 4_000
_COMPILE_STEPS: Final = 100
_MATCH_STEPS: Final = 10
# bytes times instructions for each step
_WORK_PER_STEP_SHIFT: Final = 5


class PatternFault(ValueError):
    """A pattern cannot be used. `part` is the part of it at fault; empty where it is all of it."""

    def __init__(self, message: str, part: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.part = part
        self.remedy = remedy


class Pattern(Struct, frozen=True):
    """A compiled pattern and what it cost, in instructions."""

    compiled: Any
    instructions: int
    cost: int

    def found(self, scope: Scope, text: str) -> bool:
        """Whether any part of the text suits the pattern."""
        raw = text.encode()
        spend(scope, _MATCH_STEPS + (len(raw) * self.instructions >> _WORK_PER_STEP_SHIFT))
        return self.compiled.search(raw) is not None


def _options() -> re2.Options:
    options = re2.Options()
    options.max_mem = _MAX_BYTES
    options.log_errors = False
    options.never_capture = True  # only whether there is a match is asked
    return options


_OPTIONS: Final = _options()


def classes_cost(text: str) -> int:
    return _UNICODE_CLASS_COST * len(_UNICODE_CLASS.findall(text))


@lru_cache(maxsize=512)
def compile_pattern(text: str) -> Pattern:
    """Raises PatternFault. A pattern by itself may take as much as all of a filter's."""
    if len(text) > MAX_PATTERN_CHARACTERS:
        raise PatternFault(f"a pattern of {len(text)} characters, more than {MAX_PATTERN_CHARACTERS}")
    classes = classes_cost(text)
    if classes > MAX_INSTRUCTIONS:
        raise PatternFault(
            f"a pattern with more than {MAX_INSTRUCTIONS // _UNICODE_CLASS_COST} classes like \\p{{Greek}}"
        )
    try:
        compiled = re2.compile(text.encode(), _OPTIONS)
    except re2.error as fault:
        raise _explained(bytes(fault.args[0]).decode(errors="replace")) from None
    finally:
        re2.purge()  # its own cache would keep patterns that came in an event
    instructions: int = compiled.programsize
    if instructions + classes > MAX_INSTRUCTIONS:
        raise _TOO_LARGE
    return Pattern(compiled, instructions, instructions + classes)


_TOO_LARGE: Final = PatternFault("the pattern is too large", remedy="Use smaller repetitions, and fewer.")


def _explained(error: str) -> PatternFault:
    """RE2 says `what is wrong: the part at fault`."""
    message, _, part = error.partition(": ")
    if message == "pattern too large - compile failed":
        return _TOO_LARGE
    remedy = "Patterns are RE2's."
    if part.startswith(("(?=", "(?!", "(?<")) or re.fullmatch(r"\\[0-9]", part):
        remedy = "Patterns are RE2's: there is no look-ahead, look-behind or back-reference."
    elif message == "invalid repetition size":
        remedy = "At most {1000}, also of repetitions inside each other."
    elif message.startswith(("missing", "unexpected")):
        remedy = "A bracket that stands for itself is written with a backslash, in r'…'."
    return PatternFault(f"the pattern has an error: {message}{f' `{part[:40]}`' if part else ''}", part, remedy)


def matches(scope: Scope, text: str, pattern: str) -> bool:
    """With a pattern that is known only now: it is compiled for this one time."""
    spend(scope, _COMPILE_STEPS + len(pattern) + classes_cost(pattern[:MAX_PATTERN_CHARACTERS]))
    try:
        compiled = _compile_once(pattern)
    except PatternFault:
        spend(scope, _REFUSED_STEPS)
        # the pattern may be the event's
        raise FilterFault("matches() with a pattern that is none, or too large") from None
    spend(scope, compiled.cost)
    return compiled.found(scope, text)


_compile_once: Final = compile_pattern.__wrapped__
