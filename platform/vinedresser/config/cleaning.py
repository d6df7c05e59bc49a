"""Rules that drop rows of a corpus, as a plain value."""

from typing import Annotated, Literal

from pydantic import Field

from vinedresser.config.section import Section


class Cleaning(Section):
    """Rules that drop rows. Every dropped row is counted by reason.

    Rows with an empty side are dropped from every split; all other rules apply to train only, so
    that scores on dev and test stay comparable. In train a side is also empty if it has no tokens,
    such as a zero-width mark.
    """

    # Longer side / shorter side in tokens, both with end-of-sentence; 0 for no limit. Off by
    # default: the usual ratio depends on languages and tokenizers; it is 20 between
    # frames and phones.
    max_ratio: Annotated[float, Field(ge=0)] = 0
    # Keep the first of equal pairs only. Off by default: repeats are counted, and often intended.
    dedup: bool = False
    # Rows with C0 or C1 control characters other than tab. Counted if kept: U+0085 and lone
    # carriage returns are common in clean text.
    control_characters: Literal["keep", "drop"] = "keep"
    # Train rows that are also in test. `refuse`: pairs are an error, sources alone and dev a
    # warning. `drop`: rows whose source is in dev or test are dropped. `allow`: warnings only.
    # Comparison ignores case, width and spacing. Multi30k has no such pair, and one source of dev.
    leakage: Literal["refuse", "drop", "allow"] = "refuse"
    # Largest share of train that cleaning may drop; above it the limits do not fit the corpus.
    max_drop_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    # True: sides that seem shifted against each other are an error; False: a warning.
    strict_alignment: bool = False
