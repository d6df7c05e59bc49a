"""Terms of the objective as plain values; each kind has its class in a module of `TERMS`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    SerializeAsAny,
    ValidationInfo,
    model_validator,
)

from vinedresser.config.kinds import ModelConfig, kind_class
from vinedresser.config.section import Section

if TYPE_CHECKING:
    from vinedresser.model import Seq2Seq
    from vinedresser.objective import Term

# Home of the kinds: the term `likelihood` is the module `likelihood` there.
TERMS = "vinedresser.objectives"


class TermConfig(Section):
    """Base of the configuration of a term, which lives in the term's file."""

    # Factor of the term in the loss; with 0 the term is not built.
    weight: NonNegativeFloat = 1.0

    def build(self, model: "Seq2Seq") -> "Term":
        """Return the term for a model; fresh weights are drawn from torch's global generator."""
        raise NotImplementedError

    def check(self, model: ModelConfig) -> None:
        """Refuse a model that the term cannot train.

        Raises:
            ValueError: with what to change.
        """


def _restore_term(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, TermConfig):
        return value
    name, settings = value
    found = kind_class(TERMS, name, TermConfig, "term of the objective")
    return found.model_validate(settings, context=info.context)


class Terms(Section):
    """Training loss: name of a term -> its configuration.

    `likelihood` is one of them unless its weight is 0. A name with dots is the module of any
    allowed package.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[
        str, Annotated[SerializeAsAny[TermConfig], BeforeValidator(_restore_term)]
    ] = Field(init=False)

    @model_validator(mode="before")
    @classmethod
    def _with_names(cls, value: Any) -> Any:
        """Add the name of each term to its settings, for `_restore_term`."""
        if not isinstance(value, Mapping):
            return value
        return {
            name: settings if isinstance(settings, TermConfig) else (name, settings)
            for name, settings in {"likelihood": {}, **value}.items()
        }

    @property
    def active(self) -> dict[str, TermConfig]:
        """The terms whose weight is above 0."""
        return {name: term for name, term in self.__pydantic_extra__.items() if term.weight > 0}
