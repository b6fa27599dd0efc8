"""Conversion of one row of a prompt file to a `Prompt`: keys and allowed values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd_ray.errors import DataError
from opd_ray.types import Prompt

DEFAULT_FIELDS: dict[str, str] = {
    "id": "id",
    "problem": "problem",
    "answer": "answer",
    "solution": "solution",
}


class FieldMap:
    """Names of the keys for problem, answer, solution and id; a dot goes into nested objects (``a.b``).

    Where names are joined by ``|``, the first that a row has is taken (``problem|question``).
    `names` replaces defaults (`DEFAULT_FIELDS`); an empty name leaves a field out, so that ``{"id": ""}``
    numbers the rows. Raises `DataError` on an unknown field or when problem is left out.
    """

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        unknown = sorted(set(names or {}) - set(DEFAULT_FIELDS))
        if unknown:
            raise DataError(f"fields {unknown} of the prompt data are unknown: map {list(DEFAULT_FIELDS)}")
        self._names = {**DEFAULT_FIELDS, **(names or {})}
        # A name that the user gave must be found; a default may be absent.
        self._required = {"problem", *(field for field, name in (names or {}).items() if name)}
        if not self._names["problem"]:
            raise DataError("field 'problem' of the prompt data has no name: give the key that holds the problem")

    def columns(self, names: list[str]) -> list[str]:
        """Which of the columns `names` to read; all, if a needed one is missing, for a telling error."""
        wanted = {
            field: {part for name in names_of.split("|") for part in (name, name.split(".")[0])}
            for field, names_of in self._names.items()
            if names_of
        }
        if any(wanted[field].isdisjoint(names) for field in self._required):
            return names
        return [name for name in names if any(name in keys for keys in wanted.values())]

    def prompt(self, row: Any, index: int, where: str) -> Prompt:
        """The prompt in `row`, the source's row `index` (0-based); `where` names it in errors."""
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: the row is {_kind(row)}: give an object with {self._names['problem']!r}")
        prompt = Prompt(
            id=self._scalar(row, "id", where) or f"row-{index}",
            problem=self._problem(row, where),
            answer=self._scalar(row, "answer", where),
            solution=self._text(row, "solution", where),
            index=index,
        )
        for field in DEFAULT_FIELDS:
            if _is_broken(getattr(prompt, field)):
                raise DataError(f"{where}: {self._names[field]!r} is not valid Unicode: write the file as UTF-8")
        return prompt

    def _problem(self, row: Mapping[str, Any], where: str) -> str:
        value = self._find(row, "problem", where)
        name = self._names["problem"]
        if isinstance(value, (list, tuple)):
            value = _last_user_message(value, f"{where}: {name!r}")
        if not isinstance(value, str):
            raise DataError(f"{where}: {name!r} is {_kind(value)}: give a string or a list of chat messages")
        if not value.strip():
            raise DataError(f"{where}: {name!r} is empty: give the problem's text or remove the row")
        return value

    def _text(self, row: Mapping[str, Any], field: str, where: str) -> str | None:
        value = self._find(row, field, where)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: {self._names[field]!r} is {_kind(value)}: give a string")
        return value

    def _scalar(self, row: Mapping[str, Any], field: str, where: str) -> str | None:
        value = self._find(row, field, where)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise DataError(f"{where}: {self._names[field]!r} is {_kind(value)}: give a string or a number")
        return str(value)

    def _find(self, row: Mapping[str, Any], field: str, where: str) -> Any:
        names = [name for name in self._names[field].split("|") if name]
        for name in names:
            value = _look_up(row, name)
            if value is not None:
                return value
        if names and field in self._required:
            wanted = " or ".join(repr(name) for name in names)
            raise DataError(
                f"{where}: the row has no {wanted} (keys: {_keys(row)}): add it, or map {field!r} in data.fields"
            )
        return None


def _look_up(row: Mapping[str, Any], name: str) -> Any:
    value: Any = row.get(name)
    if value is None:
        value = row
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _last_user_message(messages: list[Any] | tuple[Any, ...], where: str) -> Any:
    for message in reversed(messages):
        if isinstance(message, Mapping) and message.get("role") == "user":
            return message.get("content")
    raise DataError(f"{where} is a list without a message of role 'user': give one, or a string")


def _is_broken(text: str | None) -> bool:
    """Whether half of a surrogate pair stands alone (JSON can spell it), which no tokenizer takes."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        return True
    return False


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, list(row)[:12])) or "none"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
