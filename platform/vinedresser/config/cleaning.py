"""Which rows of a corpus a model should not see, as a plain value."""

from typing import Annotated, Literal

from pydantic import Field

from vinedresser.config.section import Section


class Cleaning(Section):
    """What becomes of rows that a model should not see. Every dropped row is counted by reason.

    Rows with an empty side are dropped from every split; all else concerns train alone, so that
    scores on dev and test stay comparable. In train a side is empty, too, if no token is left of
    it, as of a mark without width.
    """

    # Longer side / shorter side in tokens, both with end-of-sentence; 0 for no limit. Off by
    # default: what is normal depends on the pair of languages and their tokenizers, and is 20
    # between frames and phones.
    max_ratio: Annotated[float, Field(ge=0)] = 0
    # Keeps the first of equal pairs. Off by default: repeats are counted, and often meant.
    dedup: bool = False
    # Rows with C0 or C1 control characters other than tab. Kept, and counted: U+0085 and lone
    # carriage returns are common in text that is clean otherwise.
    control_characters: Literal["keep", "drop"] = "keep"
    # Train rows that stand in test. `refuse`: pairs are an error, sources alone and dev a warning.
    # `drop`: rows whose source stands in dev or test are dropped. `allow`: warnings only. Compared
    # without regard to case, width and spacing. Multi30k has no such pair, and one source of dev.
    leakage: Literal["refuse", "drop", "allow"] = "refuse"
    # More of train lost to cleaning than this is an error: the limits do not fit the corpus.
    max_drop_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    # Whether sides that seem shifted against each other are an error or a warning.
    strict_alignment: bool = False
