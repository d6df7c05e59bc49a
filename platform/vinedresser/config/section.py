"""Section: the base of all configuration. Frozen, without unknown keys, to and from JSON."""

import difflib
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from vinedresser.errors import ConfigError

MAX_PROBLEMS = 20
# Characters of a key or a found value that a message shows.
MAX_SHOWN = 80

# Key path -> its 1-based line in the file.
KeyLines = Mapping[tuple[str | int, ...], int]


class Section(BaseModel):
    """A frozen value whose unknown keys, wrong types and out-of-range numbers are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads `l0: true` as 1.0, which hides a mistake.
        if isinstance(value, bool) and info.field_name:
            accepted = set(_leaves(cls.model_fields[info.field_name].annotation))
            if accepted & {int, float} and bool not in accepted:
                raise ValueError("expected a number")
        return value

    def to_json(self) -> dict[str, Any]:
        """Return the plain JSON value from which `from_json` builds an equal section."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(
        cls,
        value: object,
        *,
        where: str = "",
        base: str | None = None,
        key_lines: KeyLines | None = None,
    ) -> Self:
        """Validate a plain value; every problem is reported, each in one line.

        Args:
            value: content of a YAML or JSON file.
            where: name of the file, for messages.
            base: folder against which relative paths inside the value are resolved.
            key_lines: key path -> line of the file, for messages.

        Raises:
            ConfigError: one line per problem, for the first 20.
        """
        try:
            return cls.model_validate(value, context={"base": base})
        except ValidationError as error:
            raise ConfigError(_explain(cls, error, value, where, key_lines or {})) from None

    def override(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with dotted keys replaced: `override({"optim.clip_norm": 1.0})`.

        Raises:
            ConfigError: an unknown key (with the nearest known one) or a refused value.
        """
        if not changes:
            return self
        tree, owners = self.to_json(), {"": self}
        # A section is replaced before the keys inside it, in any order of the changes.
        for key in sorted(changes, key=lambda key: key.count(".")):
            has_more = any(other.startswith(f"{key}.") for other in changes)
            _replace(tree, key, changes[key], owners, is_parent=has_more)
        return type(self).from_json(tree)


def _replace(
    tree: dict[str, Any], key: str, value: Any, owners: dict[str, Any], *, is_parent: bool
) -> None:
    """Set a dotted key in the JSON of a section.

    Args:
        tree: JSON of the whole section; changed in place.
        key: dotted key.
        value: plain value.
        owners: dotted prefix -> the section at it, for the whole ("") and for sections that were
            replaced before.
        is_parent: keys inside this one follow, so the value must be validated first.
    """
    owner: Any = owners[""]
    path = key.split(".")
    for i, head in enumerate(path):
        done, rest = ".".join(path[: i + 1]), ".".join(path[i + 1 :])
        if isinstance(owner, Section):
            _refuse_unknown(owner, head, tree, key)
        child = owners.get(done, getattr(owner, head, None))
        if i == len(path) - 1:
            _refuse_other_kind(owner, head, value, tree, key)
            tree[head] = value
            if is_parent and isinstance(owner, Section):
                owners[done] = _read_field(owner, head, value, key)
                tree[head] = owners[done].to_json() if isinstance(owners[done], Section) else value
        elif isinstance(child, Section):
            pass
        elif isinstance(owner, Section) and isinstance(child, Mapping):
            tree[head] = {**tree[head], rest: value}  # keys of a mapping contain dots
            return
        elif child is None and not isinstance(tree.get(head), str):
            tree[head] = tree.get(head) or {}
        else:
            raise ConfigError(f"{key}: {head} is a single value, it has no part {rest}")
        owner, tree = child, tree[head]


def _refuse_unknown(owner: Section, head: str, tree: Mapping[str, Any], key: str) -> None:
    if owner.model_config.get("extra") == "allow":
        return  # the section itself defines which keys it takes
    known = [*type(owner).model_fields, *(["kind"] if "kind" in tree else [])]
    if head not in known:
        below = _one_level_below(owner, head)
        hint = f"; did you mean {below}.{key}?" if below else did_you_mean(head, known)
        raise ConfigError(f"{key}: unknown key{hint}")


def _refuse_other_kind(
    owner: Any, head: str, value: Any, tree: Mapping[str, Any], key: str
) -> None:
    """Refuse another `kind` of a model, whose settings would not fit."""
    if not isinstance(owner, Section) or head != "kind" or head in type(owner).model_fields:
        return
    if value != tree[head]:
        whole = key.removesuffix(".kind")
        raise ConfigError(f"{key}: cannot change alone. Fix: {whole}={value}")


def _read_field(owner: Section, head: str, value: Any, key: str) -> Any:
    """Return a plain value as validated by one field of a section."""
    if head not in type(owner).model_fields:
        return getattr(
            type(owner).from_json({head: value}, where=key.removesuffix(f".{head}")), head
        )
    field = type(owner).model_fields[head]
    annotation: Any = field.annotation
    for extra in field.metadata:
        annotation = Annotated[annotation, extra]
    try:
        return TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        raise ConfigError(_explain(type(owner), error, value, key, {})) from None


def _one_level_below(owner: Section, head: str) -> str | None:
    """Return the name of the first subsection with this key; None if there is none."""
    parts = {name: getattr(owner, name) for name in type(owner).model_fields}
    having = [
        name
        for name, part in parts.items()
        if isinstance(part, Section) and head in type(part).model_fields
    ]
    return having[0] if having else None


def did_you_mean(found: str, known: Sequence[str]) -> str:
    """Return `; did you mean x?`, or the known names if none is similar."""
    near = difflib.get_close_matches(found, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known here: {', '.join(sorted(known))}"


def _explain(
    cls: type[Section], error: ValidationError, value: object, where: str, key_lines: KeyLines
) -> str:
    problems = error.errors(include_url=False)
    lines = [_line(cls, problem, value, where, key_lines) for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"{where or cls.__name__}: {len(problems) - MAX_PROBLEMS} more problems")
    return "\n".join(lines)


def _line(cls: type[Section], problem: Any, value: object, where: str, key_lines: KeyLines) -> str:
    path = _written(problem["loc"], value, is_missing=problem["type"] == "missing")
    if problem["type"] == "extra_forbidden":
        text = f"unknown key{did_you_mean(str(path[-1]), _fields_at(cls, path[:-1], value))}"
    elif problem["type"] == "missing":
        text = "required key is missing"
    else:
        message = (
            problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        )
        text = message[0].lower() + message[1:]
        if isinstance(problem["input"], str | int | float | bool | None):
            text += f"; found {shortened(json.dumps(problem['input'], ensure_ascii=False))}"
    prefixes = (path[:end] for end in range(len(path), 0, -1))
    at = next((key_lines[prefix] for prefix in prefixes if prefix in key_lines), None)
    prefix = f"{where}:{at}: " if where and at else f"{where}: " if where else ""
    key = shortened(".".join(str(part) for part in path))
    return " ".join(f"{prefix}{key + ': ' if key else ''}{text}".split())


def shortened(text: str) -> str:
    """Return a text cut to the length that messages show."""
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _written(loc: Sequence[str | int], value: Any, *, is_missing: bool) -> tuple[str | int, ...]:
    """Return the path of a problem in the file: pydantic's path contains tags of unions too."""
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


def _fields_at(cls: type[Section], path: Sequence[str | int], value: Any) -> list[str]:
    """Return the known keys at a path inside a section class."""
    classes: list[type[Section]] = [cls]
    for part in path:
        inner = [c for k in classes for c in _sections(k, str(part))]
        is_named = any(k.model_config.get("extra") == "allow" for k in classes)
        value = value[part]
        kind = value.get("kind", part if is_named else None) if isinstance(value, Mapping) else None
        classes = [c for c in inner if _is_kind(c, kind)] or inner or classes
    return sorted({name for k in classes for name in k.model_fields})


def _is_kind(cls: type[Section], kind: object) -> bool:
    """Return True if `kind` names this class: by its default, its module, or a preset there."""
    field = cls.model_fields.get("kind")
    presets = getattr(sys.modules.get(cls.__module__), "PRESETS", {})
    return (
        f".{cls.__module__}".endswith(f".{kind}")
        or bool(field and field.default == kind)
        or (isinstance(kind, str) and kind in presets)
    )


def _sections(cls: type[Section], name: str) -> list[type[Section]]:
    """Return the section classes of a field, including subclasses."""
    found: list[type[Section]] = []
    hint = (
        typing.get_type_hints(cls)["__pydantic_extra__"]
        if cls.model_config.get("extra") == "allow"
        else None
    )
    if name in cls.model_fields:
        hint = cls.model_fields[name].annotation
    open_ = [c for c in _leaves(hint) if issubclass(c, Section)]
    while open_:
        found.append(open_.pop())
        open_ += found[-1].__subclasses__()
    return found


def _leaves(annotation: Any) -> list[type]:
    """Return the plain classes inside a type hint."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation]
    return [leaf for part in typing.get_args(annotation) for leaf in _leaves(part)]
