"""What each template shows."""

from __future__ import annotations

import pytest

from opd_ray.data.templates import TEMPLATES, render
from opd_ray.errors import DataError
from opd_ray.types import Prompt

PROMPT = Prompt(id="p", problem="What is 2 + 3?", answer="5", solution="2 + 3 = 5")


def test_completions() -> None:
    student = render("completion", PROMPT)
    assert (student.kind, student.text, student.messages) == ("text", "What is 2 + 3?\n", ())
    teacher = render("completion_with_solution", PROMPT)
    assert teacher.text == "What is 2 + 3?\n2 + 3 = 5\n\nWhat is 2 + 3?\n"
    assert teacher.text.endswith(student.text)


@pytest.mark.parametrize("name", ["chat", "boxed_chat", "chat_with_solution"])
def test_chats_are_one_user_message_that_starts_with_the_problem(name: str) -> None:
    rendered = render(name, PROMPT)
    (message,) = rendered.messages
    assert (rendered.kind, rendered.text, message["role"]) == ("chat", "", "user")
    assert message["content"].startswith("What is 2 + 3?\n\n")
    assert ("\\boxed{}" in message["content"]) == (name == "boxed_chat")
    assert ("2 + 3 = 5" in message["content"]) == (name == "chat_with_solution")


def test_student_and_teacher_are_given_the_same_instruction_last() -> None:
    contents = [render(name, PROMPT).messages[0]["content"] for name in ("chat", "chat_with_solution")]
    assert len({content.rsplit("\n\n", 1)[1] for content in contents}) == 1


@pytest.mark.parametrize("solution", [None, ""])
def test_a_missing_solution_is_named(solution: str | None) -> None:
    prompt = Prompt(id="p7", problem="x", solution=solution)
    for name in TEMPLATES:
        if name.endswith("with_solution"):
            with pytest.raises(DataError, match="prompt 'p7' has no solution"):
                render(name, prompt)
        else:
            render(name, prompt)


def test_an_unknown_template_is_named_with_the_known() -> None:
    with pytest.raises(DataError, match="template 'chatt' is unknown: give one of completion, chat"):
        render("chatt", PROMPT)
