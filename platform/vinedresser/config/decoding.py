"""Decoding: the search for the output, in training evaluation, `evaluate` and `translate`."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt

from vinedresser.config.section import Section


class Decoding(Section):
    """Greedy or beam search. The section of an experiment is the default of its bundle."""

    # Hypotheses kept per sentence; 1 is greedy. Memory grows with beam x vocabulary; scores stop
    # gaining before 100.
    beam: Annotated[PositiveInt, Field(le=1000)] = 1
    # Exponent of the length penalty ((5 + n) / 6)**alpha of beams (methods.md 92).
    length_alpha: NonNegativeFloat = 0.6
    # Padded tokens per batch. 4,096 keep the scores over a vocabulary of 8,000 at 130 MB.
    max_padded_tokens: Annotated[int, Field(ge=16)] = 4096
