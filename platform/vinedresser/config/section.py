"""Section: the base of everything that is configured. Frozen, closed to typos, JSON both ways."""

import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from vinedresser.errors import ConfigError

MAX_PROBLEMS = 20

# Key path -> 1-based line of the file that it stands in.
Places = Mapping[tuple[str | int, ...], int]


class Section(BaseModel):
    """A frozen value whose unknown keys, wrong types and out-of-range numbers are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )

    def to_json(self) -> dict[str, Any]:
        """The plain JSON value that `from_json` turns back into an equal section."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(
        cls,
        value: object,
        *,
        where: str = "",
        base: str | None = None,
        places: Places | None = None,
    ) -> Self:
        """Validates a plain value; every problem is reported, each in one line.

        Args:
            value: what a YAML or JSON file holds.
            where: the file's name, for messages.
            base: folder against which relative paths inside the value are resolved.
            places: key path -> line of the file, for messages.

        Raises:
            ConfigError: one line a problem, the first 20 of them.
        """
        try:
            return cls.model_validate(value, context={"base": base})
        except ValidationError as error:
            raise ConfigError(_explain(cls, error, where, places or {})) from None

    def override(self, changes: Mapping[str, Any]) -> Self:
        """A copy with dotted keys replaced: `override({"optim.clip_norm": 1.0})`.

        Raises:
            ConfigError: an unknown key (with the nearest known one) or a refused value.
        """
        if not changes:
            return self
        tree = self.to_json()
        for key, value in changes.items():
            _replace(tree, self, key.split("."), value, key)
        return type(self).from_json(tree)


def _replace(tree: dict[str, Any], owner: Any, path: Sequence[str], value: Any, key: str) -> None:
    head, rest = path[0], path[1:]
    if isinstance(owner, Section):
        known = [*type(owner).model_fields, *(["kind"] if "kind" in tree else [])]
        if head not in known:
            raise ConfigError(f"{key}: unknown key{did_you_mean(head, known)}")
    child = getattr(owner, head, None)
    if not rest:
        tree[head] = value
    elif isinstance(child, Section):
        _replace(tree[head], child, rest, value, key)
    elif isinstance(owner, Section) and isinstance(child, Mapping):
        tree[head] = {**tree[head], ".".join(rest): value}  # a mapping's own keys hold dots
    elif child is None:
        tree[head] = tree.get(head) or {}
        _replace(tree[head], None, rest, value, key)
    else:
        raise ConfigError(f"{key}: {head} is a single value, it has no part {'.'.join(rest)}")


def did_you_mean(found: str, known: Sequence[str]) -> str:
    """`; did you mean x?`, or the known names where none is near."""
    near = difflib.get_close_matches(found, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known here: {', '.join(sorted(known))}"


def _explain(cls: type[Section], error: ValidationError, where: str, places: Places) -> str:
    problems = error.errors(include_url=False)
    lines = [_line(cls, problem, where, places) for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"{where or cls.__name__}: {len(problems) - MAX_PROBLEMS} more problems")
    return "\n".join(lines)


def _line(cls: type[Section], problem: Any, where: str, places: Places) -> str:
    path = tuple(problem["loc"])
    key = ".".join(str(part) for part in path)
    if problem["type"] == "extra_forbidden":
        text = f"unknown key{did_you_mean(str(path[-1]), _fields_at(cls, path[:-1]))}"
    elif problem["type"] == "missing":
        text = "required key is missing"
    else:
        message = problem["msg"].removeprefix("Value error, ")
        text = message[0].lower() + message[1:]
        if isinstance(problem["input"], str | int | float | bool | None):
            text += f"; found {json.dumps(problem['input'], ensure_ascii=False)}"
    at = _place(path, places)
    prefix = f"{where}:{at}: " if where and at else f"{where}: " if where else ""
    return " ".join(f"{prefix}{key + ': ' if key else ''}{text}".split())


def _place(path: tuple[str | int, ...], places: Places) -> int | None:
    """The line of the longest known part of a path; union tags in it are not keys of the file."""
    found: tuple[str | int, ...] = ()
    for part in path:
        if (*found, part) in places:
            found = (*found, part)
    return places.get(found)


def _fields_at(cls: type[Section], path: Sequence[str | int]) -> list[str]:
    """The keys that are known at a place inside a section class."""
    classes: list[type[Section]] = [cls]
    for part in path:
        inner = [c for k in classes if part in k.model_fields for c in _sections(k, str(part))]
        classes = inner or classes
    return sorted({name for k in classes for name in k.model_fields})


def _sections(cls: type[Section], name: str) -> list[type[Section]]:
    found, open_ = [], [cls.model_fields[name].annotation]
    while open_:
        hint = open_.pop()
        if isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
            found += [hint] if issubclass(hint, Section) else []
        else:
            open_ += list(typing.get_args(hint))
    return found
