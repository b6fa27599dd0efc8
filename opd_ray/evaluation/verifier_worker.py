r"""The process that runs math-verify. Run by its path, it imports nothing of this package, so that it starts fast.

Usage: ``verifier_worker.py CPU_SECONDS BYTES``. Reads lines ``[given, reference]`` (JSON) and answers each with a line:
the name of a verdict, or ``memory`` where the limit was met. It ends by itself when its input does, and by a signal
when an answer takes more than ``CPU_SECONDS`` of processor time, also where nobody is left to kill it.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
from typing import Any

READY = "ready"
MEMORY = "memory"
# math-verify builds its grammars at the first use; that is no answer's fault.
WARM_UP = (r"\frac{1}{2}x^2+\sqrt{3}", r"\left(1, \frac{\pi}{2}\right)")


def main() -> None:
    """Answer until the input ends."""
    cpu_s, num_bytes = float(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    # math-verify warns that its own time-outs are off.
    logging.disable(logging.CRITICAL)
    try:
        for text in WARM_UP:
            judge(text, text)
    except (ImportError, MemoryError) as error:
        _say(f"{type(error).__name__}: {error}")
        return
    _say(READY)
    for line in sys.stdin:
        given, reference = json.loads(line)
        # The signal's default action ends the process, also in a computation that Python cannot interrupt.
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        verdict = judge(given, reference)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(verdict)


def judge(given: str, reference: str) -> str:
    """The verdict's name for one answer; both texts are what stood in ``\\boxed{}``."""
    from math_verify import verify

    try:
        gold, found = _parse(reference), _parse(given)
        # Its own time-outs are off: they use signals that a computation in C does not see.
        if verify(gold, found, timeout_seconds=None):
            return "correct"
    except MemoryError:
        return MEMORY
    except Exception:  # noqa: BLE001  (whatever a computer algebra system raises on hostile input)
        return "unparseable"
    # Where the reference is no mathematics either, texts were compared.
    return "unparseable" if _is_mathematics(gold) and not _is_mathematics(found) else "wrong"


def _parse(answer: str) -> list[Any]:
    """What math-verify makes of an answer, expressions and their text; nothing where it fails."""
    from math_verify import parse

    try:
        # As inline mathematics, not in a box of its own, in which it does not read percent signs.
        bare = answer.replace("\\$", "").replace("$", "")
        return list(parse(f"${bare}$", parsing_timeout=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  (as above)
        return []


def _is_mathematics(parsed: list[Any]) -> bool:
    return any(not isinstance(item, str) for item in parsed)


def _say(word: str) -> None:
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
