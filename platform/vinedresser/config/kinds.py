"""Discovery of kinds: one module per model, objective term or corpus kind, by its name.

A kind is named by its module: `transformer` is short for `trainables.transformer`, and a dotted
name is the module of any allowed package. Adding a kind is adding a file.
"""

import importlib
import inspect
import os
import pkgutil
import traceback
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

from pydantic import BeforeValidator, SerializeAsAny, model_serializer, model_validator

from vinedresser.config.section import Section, did_you_mean
from vinedresser.errors import ConfigError, reworded

if TYPE_CHECKING:
    from vinedresser.model import Seq2Seq, Vocabulary

ZOO = "trainables"
# Characters of an error of other code that a message repeats.
_MAX_REASON = 300
_MAX_LAYERS = 1000

_S = TypeVar("_S", bound=Section)


def allowed_packages() -> tuple[str, ...]:
    """Return the packages whose modules a configuration may name; no others are imported.

    `VINEDRESSER_PACKAGES` adds names, separated by commas.
    """
    more = os.environ.get("VINEDRESSER_PACKAGES", "")
    own = ("trainables", "search_spaces", "pipelines", "vinedresser")
    return (*own, *(name.strip() for name in more.split(",") if name.strip()))


def load_module(name: str) -> ModuleType | None:
    """Import a module of an allowed package; None where there is no such module.

    Raises:
        ValueError: the module is outside the allowed packages, needs a package that is not
            installed, or raises or exits while it is imported.
    """
    if name.split(".")[0] not in allowed_packages():
        raise ValueError(f"not in the allowed packages {', '.join(allowed_packages())}")
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if f"{name}.".startswith(f"{error.name or name}."):
            return None
        raise ValueError(f"{name} needs {error.name}, which is not installed") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a user's module may raise or exit
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = error if isinstance(error, SyntaxError) else last
        reason = " ".join(str(error).split())[:_MAX_REASON]
        raise ValueError(
            f"{name} raises {type(error).__name__} on import, at {place.filename}:{place.lineno}: "
            f"{reason}; fix the module"
        ) from None


def kinds(package: str) -> list[str]:
    """Return the names of a package's public modules; imports none of them."""
    holder = importlib.import_module(package)
    found = (info.name for info in pkgutil.iter_modules(holder.__path__))
    return sorted(name for name in found if not name.startswith("_"))


def kind_class(package: str, kind: str, base: type[_S], what: str = "module") -> type[_S]:
    """Return the one subclass of `base` that the module of a kind defines.

    Args:
        package: package of the kinds, such as `trainables`.
        kind: a module of `package`, or the dotted name of a module of any allowed package.
        base: superclass of the class that the module must define exactly once.
        what: word for a kind of the package, for the message.

    Raises:
        ValueError: there is no such module (with the nearest name), it cannot be imported, or it
            does not define exactly one subclass.
    """
    name = kind if "." in kind else f"{package}.{kind}"
    with reworded(ValueError, ValueError, f"{kind}: "):
        module = load_module(name)
    if module is None:
        found = f"module {name}" if "." in kind else f"{what} {kind}"
        raise ValueError(f"there is no {found}{did_you_mean(kind, kinds(package))}")
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, base) and value.__module__ == name
    ]
    if len(classes) != 1:
        raise ValueError(
            f"{name} defines {len(classes)} subclasses of {base.__name__}; exactly one is expected"
        )
    return classes[0]


class ModelConfig(Section):
    """Base of a trainable's own configuration, which lives in the trainable's file.

    In JSON and YAML it carries `kind`, the module that defines it, so that a run can be rebuilt.
    """

    def build(self, vocabulary: "Vocabulary") -> "Seq2Seq":
        """Return the model with fresh weights, drawn from torch's global generator."""
        raise NotImplementedError

    def instantiate(self, vocabulary: "Vocabulary") -> "Seq2Seq":
        """Return the result of `build` for settings and a corpus that a user chose.

        Raises:
            ConfigError: the model refuses them, such as one table for two vocabularies.
        """
        with reworded(ValueError, ConfigError, "model: "):
            return self.build(vocabulary)

    @model_validator(mode="after")
    def _has_few_layers(self) -> Self:
        # 1,000 layers are ten times the deepest models that train; a typo of 10^9 never ends.
        for name in type(self).model_fields:
            if name.endswith("layers") and getattr(self, name) > _MAX_LAYERS:
                raise ValueError(f"{name} is {getattr(self, name)}; at most {_MAX_LAYERS}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _without_kind(cls, value: Any) -> Any:
        """Accept the class's own `kind`, which `_with_kind` writes."""
        if isinstance(value, Mapping) and value.get("kind") == cls.__module__:
            return {key: item for key, item in value.items() if key != "kind"}
        return value

    @model_serializer(mode="wrap")
    def _with_kind(self, handler: Any) -> dict[str, Any]:
        return {"kind": type(self).__module__, **handler(self)}


def presets() -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Map each preset to its trainable and the settings it changes; imports the whole zoo.

    Raises:
        ValueError: a module of the zoo cannot be imported.
    """
    return {
        name: (module, changes)
        for module in kinds(ZOO)
        for name, changes in getattr(load_module(f"{ZOO}.{module}"), "PRESETS", {}).items()
    }


def named_model(name: str, changes: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return a model by the name of its module or of a preset, with some settings replaced.

    Args:
        name: `transformer`, `transformer-small`, or `my_zoo.mine` from an allowed package.
        changes: field -> value. A section inside a preset keeps what `changes` do not name.

    Raises:
        ValueError: no such model (with the nearest name), or refused settings.
    """
    if "." in name or name in kinds(ZOO):
        return kind_class(ZOO, name, ModelConfig).model_validate(changes or {})
    known = presets()
    if name not in known:
        raise ValueError(f"there is no model {name}{did_you_mean(name, [*kinds(ZOO), *known])}")
    module, settings = known[name]
    base = kind_class(ZOO, module, ModelConfig)().override(settings)
    return type(base).model_validate(_merged(base.to_json(), changes or {}))


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return both, `above` where they differ; mappings inside both are merged in the same way."""
    return {**below, **above} | {
        key: _merged(below[key], item)
        for key, item in above.items()
        if isinstance(item, Mapping) and isinstance(below.get(key), Mapping)
    }


def _restore_model(value: Any) -> Any:
    """Build a model from its name, or from a mapping of `kind` and settings."""
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping):
        return value
    if "kind" not in value:
        raise ValueError("`kind` is missing, for example `kind: transformer`")
    changes = {key: item for key, item in value.items() if key != "kind"}
    return named_model(str(value["kind"]), changes)


AnyModel = Annotated[SerializeAsAny[ModelConfig], BeforeValidator(_restore_model)]
