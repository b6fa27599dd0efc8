r"""Where the final answer stands in a response, and whether it is the right one: a table of named formats.

`tiny` is the embedded task's, `last_number` and `hash_number` fit GSM8K, `boxed` fits competition mathematics. Every
function reads its text a constant number of times: a megabyte of braces or digits costs no more than its length. What
is equal here is equal; for `boxed` it takes computer algebra (`verifier`) to know that two answers differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from opd_ray.config.choices import AnswerFormat
from opd_ray.evaluation.verdict import Verdict
from opd_ray.tiny import task

# A minus is a sign only where it cannot be a subtraction; a comma counts only before three digits.
_NUMBER = r"(?:(?<![\w)])[-\u2212]\$?)?(?:[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
_ANY_NUMBER = re.compile(_NUMBER)
_MARKED_NUMBER = re.compile(rf"####[ \t]*\$?({_NUMBER})")

_BOXED_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|textrm)\s*\{([^{}]*)\}")
_UNIT_AT_END = re.compile(r"(?<=[0-9}])\\(?:text|mathrm|mbox|textrm)\s*\{[^{}]*\}(?:\^\{?[0-9]\}?)?\Z")
_SHORT_FRACTION = re.compile(r"\\frac([0-9])([0-9])")
_SHORT_ROOT = re.compile(r"\\sqrt([0-9A-Za-z])")
_SHORT_SCRIPT = re.compile(r"([_^])\{([0-9A-Za-z])\}")
_SPACE = re.compile(r"(?<!\\)\\ |\s")
_DEGREES = re.compile(r"\^\{?\\circ\}?")
_ASSIGNMENT = re.compile(r"[A-Za-z]=(?=[^=])")
_GROUPED = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_PLAIN = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_FRACTION = re.compile(r"([-+]?)(?:\\frac\{(-?[0-9]+)\}\{(-?[0-9]+)\}|([0-9]+)/([0-9]+))")
_DROPPED = (
    "\\left", "\\right", "\\displaystyle", "\\!", "\\,", "\\;", "\\:", "\\$", "$", "\\%", "%",
    "\\(", "\\)", "\\[", "\\]",
)  # fmt: skip
_WHOLE = re.compile(r"[-+]?[0-9]{1,18}")
_MAX_NUMBER_CHARS = 100
"""Longer digit strings are compared as text: exact fractions of them would not take linear time."""


@dataclass(frozen=True, slots=True)
class _Format:
    """`extract` finds a response's final answer, `reference` the key's, `equal` and `differ` compare the two.

    Where neither of these holds, it takes algebra to tell.
    """

    extract: Callable[[str], str | None]
    equal: Callable[[str, str], bool]
    differ: Callable[[str, str], bool]
    reference: Callable[[str], str | None]


def is_correct(answer_format: AnswerFormat, response: str, answer: str) -> bool:
    """Tell whether the response's final answer is the reference `answer`, without algebra; False if it has none.

    The reference may be the bare answer or, except for `tiny`, a solution that ends with it.
    """
    wanted = reference(answer_format, answer)
    return wanted is not None and verdict(answer_format, extract(answer_format, response), wanted) is Verdict.correct


def verdict(answer_format: AnswerFormat, given: str | None, wanted: str) -> Verdict | None:
    """What comparing `given` (as `extract` found it) with `wanted` (`reference`) tells; None where it takes algebra."""
    form = _FORMATS[answer_format]
    if not given:
        return Verdict.no_answer
    if form.equal(given, wanted):
        return Verdict.correct
    return Verdict.wrong if form.differ(given, wanted) else None


def extract(answer_format: AnswerFormat, response: str) -> str | None:
    """Return the response's final answer as it stands there, or None."""
    return _FORMATS[answer_format].extract(response)


def reference(answer_format: AnswerFormat, answer: str) -> str | None:
    """Return the bare reference in `answer`; None where it has none, so that no response could be correct."""
    return _FORMATS[answer_format].reference(answer)


def last_number(text: str) -> str | None:
    """Return the number after the last ``####``, else the last number of the text, else None.

    The number comes without thousands separators, ``$`` and ``%``, and without a sentence's period.
    """
    number = hash_number(text)
    if number is None:
        for match in _ANY_NUMBER.finditer(text):
            number = match.group()
    return None if number is None else _plain(number)


def hash_number(text: str) -> str | None:
    """Return the number after the last ``####``, or None; written as by `last_number`."""
    number = None
    for match in _MARKED_NUMBER.finditer(text):
        number = match.group(1)
    return None if number is None else _plain(number)


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "").replace("\u2212", "-")


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last ``\boxed{...}`` (or ``\fbox``) with balanced braces, or None.

    Of nested boxes the innermost counts, as it opens last. A box never closed does not hide an earlier one.
    """
    open_braces: list[tuple[int, bool]] = []
    best: tuple[int, int] | None = None
    for match in _BOXED_OR_BRACE.finditer(text):
        token = match.group()
        if token == "}":
            if open_braces:
                start, boxed = open_braces.pop()
                if boxed and (best is None or start > best[0]):
                    best = (start, match.start())
        elif token.endswith("{") and token != "\\{":
            open_braces.append((match.end(), token != "{"))
    return None if best is None else text[best[0] : best[1]].strip()


def same_number(left: str, right: str) -> bool:
    """Compare two decimal numbers exactly: ``1234`` equals ``1234.0``."""
    return Decimal(left) == Decimal(right)


def same_expression(left: str, right: str) -> bool:
    r"""Compare two answers after light normalisation, by value where both are numbers or simple fractions.

    Normalisation drops spacing, ``\left``/``\right``, dollar and percent signs, degrees, ``\text{}``, units
    after a number, ``x=`` before a value and the final period; it writes ``\dfrac12`` as ``\frac{1}{2}``,
    ``\sqrt2`` as ``\sqrt{2}`` and ``x^{2}`` as ``x^2``. Symbolic equivalence (``2k+2`` and ``2(k+1)``) is not
    seen: that takes computer algebra (`verifier`).
    """
    left, right = _normalized(left), _normalized(right)
    if left == right:
        return True
    left_value, right_value = _value(left), _value(right)
    return left_value is not None and left_value == right_value


def different_whole_numbers(left: str, right: str) -> bool:
    """Tell whether both are plain whole numbers, and not the same: no algebra can make them equal."""
    left, right = left.strip(), right.strip()
    return bool(_WHOLE.fullmatch(left) and _WHOLE.fullmatch(right)) and int(left) != int(right)


def _normalized(text: str) -> str:
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("{,}", ",").replace("\u2212", "-")
    text = _SPACE.sub("", text)
    for mark in _DROPPED:
        text = text.replace(mark, "")
    text = _UNIT_AT_END.sub("", _DEGREES.sub("", text).rstrip("."))
    text = _TEXT_COMMAND.sub(r"\1", text).rstrip(".")
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _SHORT_SCRIPT.sub(r"\1\2", _SHORT_ROOT.sub(r"\\sqrt{\1}", text))
    if _ASSIGNMENT.match(text):
        text = text[2:]
    return text.replace(",", "") if _GROUPED.fullmatch(text) else text


def _value(text: str) -> Fraction | None:
    """The exact value of a plain number or of a fraction of whole numbers, else None."""
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    if _PLAIN.fullmatch(text):
        return Fraction(text)
    match = _FRACTION.fullmatch(text)
    if not match:
        return None
    sign, *parts = match.groups()
    numerator, denominator = (int(part) for part in parts if part is not None)
    if denominator == 0:
        return None
    return Fraction(numerator, denominator) * (-1 if sign == "-" else 1)


def _boxed_reference(answer: str) -> str | None:
    boxed = last_boxed(answer)
    return boxed if boxed is not None else answer.strip() or None


def _tiny_reference(answer: str) -> str | None:
    return answer if answer.isascii() and answer.isdigit() else None


def _always(left: str, right: str) -> bool:
    return True


_FORMATS: Mapping[AnswerFormat, _Format] = {
    AnswerFormat.tiny: _Format(task.extract_answer, str.__eq__, _always, _tiny_reference),
    AnswerFormat.last_number: _Format(last_number, same_number, _always, last_number),
    AnswerFormat.hash_number: _Format(hash_number, same_number, _always, last_number),
    AnswerFormat.boxed: _Format(last_boxed, same_expression, different_whole_numbers, _boxed_reference),
}
