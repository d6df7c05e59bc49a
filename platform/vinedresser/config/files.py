"""Values behind names of the command line: an import path, or a YAML/JSON file.

YAML is parsed by PyYAML, and scalars are read by the core schema of YAML 1.2: `no` and `on` are
strings, `012` and `1e-3` are numbers in decimal, `12:30` is a string. Duplicate keys, tags, anchors
and aliases are refused. ruamel.yaml would not replace this reader: it makes 1000 of `1_000` and a
date of `2026-01-31`, accepts tags and aliases, and takes 19 s for a file of open brackets.
"""

import json
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vinedresser.config.kinds import allowed_packages, load_module
from vinedresser.config.section import Section, shortened
from vinedresser.errors import ConfigError, reworded

MAX_BYTES = 1 << 20
MAX_DEPTH = 50

# Python reads no integer of more digits; longer ones become infinite floats, which are refused.
_INT = re.compile(r"[-+]?[0-9]{1,4300}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")

KeyPath = tuple[str | int, ...]
_S = TypeVar("_S", bound=Section)


def scalar(text: str) -> Any:
    """Return a plain scalar by YAML 1.2's core schema: null, bool, int, float, else string."""
    if text in {"null", "Null", "NULL", "~", ""}:
        return None
    if text in {"true", "True", "TRUE", "false", "False", "FALSE"}:
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def refused(value: Any) -> str:
    """Return the reason to refuse a plain value as a setting; empty if it is accepted.

    Refuses values that fail inside libraries: integers beyond 64 bits, control characters.
    """
    if isinstance(value, Mapping):
        return next(filter(None, map(refused, [*value, *value.values()])), "")
    if isinstance(value, list):
        return next(filter(None, map(refused, value)), "")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "an integer beyond 64 bits; give a smaller one"
    if isinstance(value, str):
        for char in value:
            if (ord(char) < 32 and char != "\t") or "\ud800" <= char <= "\udfff":
                return f"the character {char!a} is not accepted; remove it"
    return ""


def _joined(text: str) -> str:
    r"""Replace JSON's pairs of escapes such as \ud83d\ude00 by the character that they encode."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class _Reader:
    """Convert YAML nodes to plain values; `key_lines` has the line of every key."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.key_lines: dict[KeyPath, int] = {}

    def value(self, node: yaml.Node, path: KeyPath = ()) -> Any:
        if isinstance(node, yaml.ScalarNode):
            found = _joined(node.value) if node.style else scalar(node.value)
            if problem := refused(found):
                raise ConfigError(f"{self.name}:{node.start_mark.line + 1}: {problem}")
            return found
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*path, i)) for i, child in enumerate(node.value)]
        result: dict[str, Any] = {}
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self.name}:{line}: a key is one word, not a list or mapping")
            key = _joined(key_node.value)
            if problem := refused(key):
                raise ConfigError(f"{self.name}:{line}: {problem}")
            if key in result:
                first = self.key_lines[(*path, key)]
                raise ConfigError(f"{self.name}:{line}: key {key} again, first in line {first}")
            self.key_lines[(*path, key)] = line
            result[key] = self.value(child, (*path, key))
        return result


def _refuse_exotic(text: str, name: str) -> None:
    depth = 0
    problem = ""
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        exotic = (
            "an alias" if isinstance(event, yaml.AliasEvent)
            else "an anchor" if getattr(event, "anchor", None)
            else "a tag" if getattr(event, "tag", None)
            else ""
        )  # fmt: skip
        if exotic:
            problem = f"{exotic} is not read; write the value out"
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            problem = f"nested deeper than {MAX_DEPTH}; flatten it"
        if problem:
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise ConfigError(f"{name}:{line}: {problem}")


def read_file(path: Path) -> tuple[Any, dict[KeyPath, int]]:
    """Return the plain value of a YAML or JSON file and the line of each of its keys.

    Raises:
        ConfigError: no such file, too large, not UTF-8, or not YAML; with file and line.
    """
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # reading a pipe may never end
            raise ConfigError(f"{path}: not a regular file; name a .yaml or .json file")
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or 'cannot be read').lower()}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: too large; a configuration has at most {MAX_BYTES} bytes")
    try:
        text = content.decode()
        if path.suffix == ".json":
            text = text.replace("\t", " ")  # tabs may indent JSON, but not YAML
        _refuse_exotic(text, str(path))
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        at, text = str(path), " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError):
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            at, text = f"{path}:{line}", str(error.problem)
        raise ConfigError(f"{at}: not YAML: {text}") from None
    if node is None:
        raise ConfigError(f"{path}: empty; expected a mapping of keys")
    reader = _Reader(str(path))
    return reader.value(node), reader.key_lines


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Read `["optim.clip_norm=1.0", ...]`: JSON where it parses, else a scalar of YAML 1.2."""
    changes = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"{shortened(word)}: not an override; write key=value, as optim.clip_norm=1.0"
            )
        try:
            changes[key] = json.loads(text)
        except (ValueError, RecursionError):
            changes[key] = scalar(text)
        if problem := refused(key) or refused(changes[key]):
            raise ConfigError(f"{shortened(key)}: {problem}")
    return changes


def resolve(name: str, kinds: Sequence[type[_S]]) -> _S:
    """Return the value of one of the given kinds behind an import path or a file.

    Args:
        name: `search_spaces.demo`, `search_spaces.demo.study`, or `tasks/mine.yaml`.
        kinds: accepted classes in order of preference. A module must define exactly one value
            of the first kind that it defines any of; a file is of the first kind that has all of
            its keys, else of the first.

    Raises:
        ConfigError: the name is unknown, defines no value or several values of these kinds, or
            the value is refused.
    """
    if name.endswith((".yaml", ".yml", ".json")) or "/" in name:
        return _resolve_file(name, kinds)
    if name.split(".")[0] not in allowed_packages():
        raise ConfigError(
            f"{name}: not a .yaml/.json file and not in the packages "
            f"{', '.join(allowed_packages())}; name {_listed(kinds)}, or set VINEDRESSER_PACKAGES"
        )
    module_name, attribute = name, ""
    with reworded(ValueError, ConfigError):
        module = load_module(name)
        if module is None and "." in name:
            module_name, _, attribute = name.rpartition(".")
            module = load_module(module_name)
    if module is None:
        raise ConfigError(f"{name}: there is no such module; expected {_listed(kinds)}")
    held = {key: value for key, value in vars(module).items() if not attribute or key == attribute}
    for kind in kinds:
        found = {key: value for key, value in held.items() if isinstance(value, kind)}
        if len(found) == 1:
            return next(iter(found.values()))
        if found:
            raise ConfigError(
                f"{name} holds {', '.join(sorted(found))}; name one, as {name}.{min(found)}"
            )
    names = " or ".join(kind.__name__ for kind in kinds)
    if attribute:
        raise ConfigError(f"{name}: {module_name} has no {names} called {attribute}")
    raise ConfigError(f"{name} holds no {names}")


def _resolve_file(name: str, kinds: Sequence[type[_S]]) -> _S:
    """Return the value of a file; a file of another kind is refused in one line."""
    path = Path(name)
    plain, key_lines = read_file(path)
    keys = {str(key) for key in plain} if isinstance(plain, Mapping) else set()
    kind = next((kind for kind in kinds if keys <= set(kind.model_fields)), None)
    if kind is None:
        from vinedresser.config.experiment import Experiment
        from vinedresser.config.study import Study
        from vinedresser.config.task import Task

        for other in (Task, Experiment, Study):
            required = {key for key, field in other.model_fields.items() if field.is_required()}
            if required <= keys <= set(other.model_fields):
                raise ConfigError(f"{name}: is {_listed([other])}, expected {_listed(kinds)}")
    base = str(path.resolve().parent)
    return (kind or kinds[0]).from_json(plain, where=name, base=base, key_lines=key_lines)


def _listed(kinds: Sequence[type[Section]]) -> str:
    """Return "an Experiment or a Study"."""
    names = (kind.__name__ for kind in kinds)
    return " or ".join(f"{'an' if name[0] in 'AEIO' else 'a'} {name}" for name in names)
