"""Decoding: the search for the output, in training evaluation, `evaluate` and `translate`."""

from typing import Annotated, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from vinedresser.config.section import Section


class Decoding(Section):
    """Greedy search, beam search or sampling; the default of a bundle is its experiment's."""

    # Hypotheses kept per sentence; 1 is greedy. Memory grows with beam x vocabulary; scores stop
    # gaining before 100.
    beam: Annotated[PositiveInt, Field(le=1000)] = 1
    # Exponent of the length penalty ((5 + n) / 6)**alpha of beams (methods.md 92).
    length_alpha: NonNegativeFloat = 0.6
    # Beams only: a hypothesis is dropped when its log-probability is more than this many nats below
    # that of the best one of equal length. None keeps all (methods.md 92).
    beam_spread: NonNegativeFloat | None = None
    # Tokens of an output before its end; the end is not chosen earlier.
    min_length: NonNegativeInt = 0
    # Tokens of an output, at most. None: twice those of its source and 10. The task's
    # max_target_length is a bound in both cases.
    max_length: PositiveInt | None = None
    # Draw each token instead of searching. Draws depend on the seed and the source sentence alone.
    sample: bool = False
    seed: NonNegativeInt = 0
    # Log-probabilities are divided by it before a draw.
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    # Draw from this many of the most probable tokens; 0 takes all.
    top_k: NonNegativeInt = 0
    # Draw from the fewest most probable tokens that hold this share of the probability.
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    # Padded tokens per batch. 4,096 keep the scores over a vocabulary of 8,000 at 130 MB.
    max_padded_tokens: Annotated[int, Field(ge=16)] = 4096

    @model_validator(mode="after")
    def _refuse_what_has_no_effect(self) -> Self:
        if self.sample and self.beam > 1:
            raise ValueError(f"sample: no search, but beam is {self.beam}; Fix: beam=1")
        if self.beam == 1 and self.beam_spread is not None:
            raise ValueError("beam_spread: no effect without beams; Fix: beam=2 or more")
        for name in ("seed", "temperature", "top_k", "top_p"):
            if not self.sample and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: no effect on a search; Fix: sample=true")
        if self.max_length is not None and self.min_length > self.max_length:
            raise ValueError(
                f"min_length is {self.min_length}, over max_length, which is {self.max_length}"
            )
        return self

    @property
    def signature(self) -> str:
        """Return all that changes an output, `|` between the settings."""
        parts = ["search:greedy"]
        if self.beam > 1:
            parts = [f"beam:{self.beam}", f"alpha:{self.length_alpha:g}"]
            parts += [f"spread:{self.beam_spread:g}"] if self.beam_spread is not None else []
        if self.sample:
            drawn = f"k:{self.top_k}|p:{self.top_p:g}|seed:{self.seed}"
            parts = [f"search:sample|temperature:{self.temperature:g}|{drawn}"]
        parts += [f"min:{self.min_length}"] if self.min_length else []
        parts += [f"max:{self.max_length}"] if self.max_length is not None else []
        return "|".join(parts)
