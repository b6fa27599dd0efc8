"""The verdict on one answer."""

from __future__ import annotations

from enum import Enum


class Verdict(Enum):
    """`correct` or `wrong`; or nothing to compare was found.

    `no_answer`: the response has no final answer in its benchmark's format; `unparseable`: it has one that is no
    mathematics that the verifier can read, while the reference is; `timeout`: checking it took more time or memory than
    allowed. Only `correct` counts as correct, but the others are not the same as `wrong`.
    """

    correct = "correct"
    wrong = "wrong"
    no_answer = "no_answer"
    unparseable = "unparseable"
    timeout = "timeout"
