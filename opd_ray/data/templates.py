"""Named templates: how a problem becomes what student or teacher is shown. Tokenising is done elsewhere.

A response follows directly after what is rendered. Student and teacher may use different templates; a teacher
that is shown the worked solution (on-policy self-distillation) uses one of the ``*_with_solution``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from opd_ray.errors import DataError
from opd_ray.types import Prompt

REASON = "Think it through step by step, and give the final answer at the end."
BOX = "Think it through step by step, and put the final answer in \\boxed{}."
REFERENCE = "For reference, here is a correct solution. Solve the problem in your own words; do not mention it."


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """What a model is shown: a completion's `text`, or chat `messages` for the tokenizer's chat template.

    `kind` tells which of the two is filled; messages are dicts with the keys role and content.
    """

    kind: Literal["text", "chat"]
    text: str = ""
    messages: tuple[dict[str, str], ...] = ()


def render(template: str, prompt: Prompt) -> RenderedPrompt:
    """`prompt` in that template; raises `DataError` when it is unknown or its solution is missing."""
    if template not in TEMPLATES:
        raise DataError(f"template {template!r} is unknown: give one of {', '.join(TEMPLATES)}")
    return TEMPLATES[template](prompt)


def _completion(prompt: Prompt) -> RenderedPrompt:
    return RenderedPrompt("text", text=f"{prompt.problem}\n")


def _completion_with_solution(prompt: Prompt) -> RenderedPrompt:
    # The problem comes again after its solution, so that the response follows what the student was shown.
    return RenderedPrompt("text", text=f"{prompt.problem}\n{_solution(prompt)}\n\n{prompt.problem}\n")


def _chat(prompt: Prompt) -> RenderedPrompt:
    return _user(prompt.problem, REASON)


def _plain_chat(prompt: Prompt) -> RenderedPrompt:
    return _user(prompt.problem)


def _boxed_chat(prompt: Prompt) -> RenderedPrompt:
    return _user(prompt.problem, BOX)


def _chat_with_solution(prompt: Prompt) -> RenderedPrompt:
    return _user(prompt.problem, REFERENCE, _solution(prompt), REASON)


def _user(*paragraphs: str) -> RenderedPrompt:
    return RenderedPrompt("chat", messages=({"role": "user", "content": "\n\n".join(paragraphs)},))


def _solution(prompt: Prompt) -> str:
    if not prompt.solution:
        raise DataError(
            f"prompt {prompt.id!r} has no solution and its template shows one: choose a template without, or "
            "map 'solution' in data.fields"
        )
    return prompt.solution


TEMPLATES: dict[str, Callable[[Prompt], RenderedPrompt]] = {
    "completion": _completion,
    "chat": _chat,
    "plain_chat": _plain_chat,
    "boxed_chat": _boxed_chat,
    "chat_with_solution": _chat_with_solution,
    "completion_with_solution": _completion_with_solution,
}
