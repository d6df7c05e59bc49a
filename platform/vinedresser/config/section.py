"""Section: the base of everything that is configured. Frozen, closed to typos, JSON both ways."""

import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from vinedresser.errors import ConfigError

MAX_PROBLEMS = 20
# Characters of a key or a found value that a message shows.
MAX_SHOWN = 80

# Key path -> 1-based line of the file that it stands in.
Places = Mapping[tuple[str | int, ...], int]


class Section(BaseModel):
    """A frozen value whose unknown keys, wrong types and out-of-range numbers are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads `l0: true` as 1.0; who writes it means something else.
        if isinstance(value, bool) and info.field_name:
            wanted = set(_leaves(cls.model_fields[info.field_name].annotation))
            if wanted & {int, float} and bool not in wanted:
                raise ValueError("a number is wanted")
        return value

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
            raise ConfigError(_explain(cls, error, value, where, places or {})) from None

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
            below = _one_level_below(owner, head)
            hint = f"; did you mean {below}.{key}?" if below else did_you_mean(head, known)
            raise ConfigError(f"{key}: unknown key{hint}")
    child = getattr(owner, head, None)
    if not rest:
        tree[head] = value
    elif isinstance(child, Section):
        _replace(tree[head], child, rest, value, key)
    elif isinstance(owner, Section) and isinstance(child, Mapping):
        tree[head] = {**tree[head], ".".join(rest): value}  # a mapping's own keys hold dots
    elif child is None and not isinstance(tree.get(head), str):
        tree[head] = tree.get(head) or {}
        _replace(tree[head], None, rest, value, key)
    else:
        raise ConfigError(f"{key}: {head} is a single value, it has no part {'.'.join(rest)}")


def _one_level_below(owner: Section, head: str) -> str | None:
    """The part of a section that knows a key which the section itself does not."""
    parts = {name: getattr(owner, name) for name in type(owner).model_fields}
    knowing = [
        name
        for name, part in parts.items()
        if isinstance(part, Section) and head in type(part).model_fields
    ]
    return knowing[0] if knowing else None


def did_you_mean(found: str, known: Sequence[str]) -> str:
    """`; did you mean x?`, or the known names where none is near."""
    near = difflib.get_close_matches(found, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known here: {', '.join(sorted(known))}"


def _explain(
    cls: type[Section], error: ValidationError, value: object, where: str, places: Places
) -> str:
    problems = error.errors(include_url=False)
    lines = [_line(cls, problem, value, where, places) for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"{where or cls.__name__}: {len(problems) - MAX_PROBLEMS} more problems")
    return "\n".join(lines)


def _line(cls: type[Section], problem: Any, value: object, where: str, places: Places) -> str:
    path = _written(problem["loc"], value, is_missing=problem["type"] == "missing")
    if problem["type"] == "extra_forbidden":
        text = f"unknown key{did_you_mean(str(path[-1]), _fields_at(cls, path[:-1], value))}"
    elif problem["type"] == "missing":
        text = "required key is missing"
    else:
        message = problem["msg"].removeprefix("Value error, ")
        text = message[0].lower() + message[1:]
        if isinstance(problem["input"], str | int | float | bool | None):
            text += f"; found {_short(json.dumps(problem['input'], ensure_ascii=False))}"
    at = _place(path, places)
    prefix = f"{where}:{at}: " if where and at else f"{where}: " if where else ""
    key = _short(".".join(str(part) for part in path))
    return " ".join(f"{prefix}{key + ': ' if key else ''}{text}".split())


def _short(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _written(loc: Sequence[str | int], value: Any, *, is_missing: bool) -> tuple[str | int, ...]:
    """A problem's path as it stands in the file: pydantic's has the tags of unions in it too."""
    path: list[str | int] = []
    for i, part in enumerate(loc):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and isinstance(part, int):
            value = value[part] if part < len(value) else None
        elif not (is_missing and i == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


def _place(path: tuple[str | int, ...], places: Places) -> int | None:
    """The line of the longest part of a path that the file has a line for."""
    for end in range(len(path), 0, -1):
        if path[:end] in places:
            return places[path[:end]]
    return None


def _fields_at(cls: type[Section], path: Sequence[str | int], value: Any) -> list[str]:
    """The keys that are known at a place inside a section class."""
    classes: list[type[Section]] = [cls]
    for part in path:
        inner = [c for k in classes if part in k.model_fields for c in _sections(k, str(part))]
        value = value[part]
        kind = value.get("kind") if isinstance(value, Mapping) else None
        classes = [c for c in inner if _is_kind(c, kind)] or inner or classes
    return sorted({name for k in classes for name in k.model_fields})


def _is_kind(cls: type[Section], kind: object) -> bool:
    """Whether `kind` in a file means this class: its default, or the module that defines it."""
    field = cls.model_fields.get("kind")
    return f".{cls.__module__}".endswith(f".{kind}") or bool(field and field.default == kind)


def _sections(cls: type[Section], name: str) -> list[type[Section]]:
    """The section classes that a field may hold, subclasses included."""
    found: list[type[Section]] = []
    open_ = [c for c in _leaves(cls.model_fields[name].annotation) if issubclass(c, Section)]
    while open_:
        found.append(open_.pop())
        open_ += found[-1].__subclasses__()
    return found


def _leaves(annotation: Any) -> list[type]:
    """The plain classes inside a type hint."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation]
    return [leaf for part in typing.get_args(annotation) for leaf in _leaves(part)]
