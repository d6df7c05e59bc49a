"""Embeddings of a source: token embeddings, character convolutions, or projected frames.

B sentences, S positions, D features, F features of a frame.
"""

from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from vinedresser.batch import is_real
from vinedresser.config.section import Section
from vinedresser.nn.attention import linear
from vinedresser.nn.convolution import windows
from vinedresser.special_ids import PAD

if TYPE_CHECKING:
    from vinedresser.model import Vocabulary


class SourceEmbeddingConfig(Section):
    """Embedding of source ids. Frames are always projected, with `kind: table`."""

    # table: one vector per id. characters: for ids that are characters, convolutions of several
    # widths over their vectors and highway layers (methods.md 61).
    kind: Literal["table", "characters"] = "table"
    # characters only: features of a character, the widths of the filters, how many of each width,
    # and highway layers. Lee et al. 2017 pool the result: `subsampling: {kind: pool, pool: max}`.
    character_features: PositiveInt = 64
    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 3, 4, 5)
    filters: PositiveInt = 64
    highways: Annotated[int, Field(ge=0)] = 1


def token_table(size: int, width: int, std: float | None = None) -> nn.Embedding:
    """Return a table of rows (width,) from N(0, std^2), std width**-0.5 by default; PAD is 0."""
    table = nn.Embedding(size, width, padding_idx=PAD)
    nn.init.normal_(table.weight, std=width**-0.5 if std is None else std)
    with torch.no_grad():
        table.weight[PAD].zero_()
    return table


class Highway(nn.Module):
    """t * relu(x W + b) + (1 - t) * x with t = sigmoid(x V + c) (Srivastava et al. 2015).

    c starts at -2, as they advise: the layer begins near the identity.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.transform, self.gate = linear(width, width), linear(width, width)
        nn.init.constant_(self.gate.bias, -2.0)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Map (..., D) -> (..., D)."""
        return torch.lerp(x_BSD, F.relu(self.transform(x_BSD)), torch.sigmoid(self.gate(x_BSD)))


class CharacterConvolution(nn.Module):
    """relu of convolutions of several widths over character vectors, highways, a projection.

    As many positions come out as go in (Kim et al. 2016 pool over a word, Lee et al. 2017 over
    five characters: here that is left to the subsampling). A filter of even width sees one
    character more on its right. Padding is read as zeros.
    """

    def __init__(
        self, size: int, width: int, config: SourceEmbeddingConfig, *, scale: float
    ) -> None:
        super().__init__()
        features, filters = config.character_features, config.filters
        self.table = token_table(size, features, std=1.0)
        self.widths = config.widths
        self.filters = nn.ModuleList(linear(k * features, filters) for k in config.widths)
        gathered = filters * len(config.widths)
        self.highways = nn.Sequential(*(Highway(gathered) for _ in range(config.highways)))
        self.project = linear(gathered, width)
        with torch.no_grad():
            self.project.weight.mul_(scale * width**-0.5)

    def forward(self, source_BS: Tensor, lengths_B: Tensor) -> Tensor:
        """Map (B, S) ids, (B,) -> (B, S, D)."""
        is_real_BS1 = is_real(lengths_B, source_BS.shape[1])[:, :, None]
        x_BSD = self.table(source_BS).masked_fill(~is_real_BS1, 0.0)
        found = [
            layer(windows(x_BSD, k, left=(k - 1) // 2, right=k // 2))
            for k, layer in zip(self.widths, self.filters, strict=True)
        ]
        embedded: Tensor = self.project(self.highways(F.relu(torch.cat(found, -1))))
        return embedded


class SourceEmbedding(nn.Module):
    """Source ids (B, S) or frames (B, S, F) -> (B, S, D).

    Frames go through a linear layer and LayerNorm. A fresh module gives vectors of length about
    `scale`, whatever the kind. Padding beyond the lengths changes no position before them; outputs
    at padding are finite and otherwise undefined. `width` is D; `scale` is the factor on the
    table's vectors, sqrt(D) in Vaswani et al. 2017, the other kinds have it in their first weights;
    `table` is one to share, where source and target are tied.
    """

    def __init__(
        self,
        vocabulary: "Vocabulary",
        width: int,
        config: SourceEmbeddingConfig | None = None,
        *,
        scale: float = 1.0,
        table: nn.Embedding | None = None,
    ) -> None:
        super().__init__()
        config = config or SourceEmbeddingConfig()
        self.scale, self.is_frames = scale, vocabulary.features > 0
        is_table = config.kind == "table"
        if not is_table and (self.is_frames or table is not None):
            what = "the source is frames" if self.is_frames else "the table is tied"
            raise ValueError(
                f"embedding.kind: characters reads ids into a separate table, but {what}; "
                "Fix: set embedding.kind: table"
            )
        if self.is_frames and table is not None:
            raise ValueError("the source is frames, it has no table to tie; Fix: set tie: output")
        if self.is_frames:
            self.project = linear(vocabulary.features, width)
            self.norm = nn.LayerNorm(width)
            nn.init.constant_(self.norm.weight, scale * width**-0.5)
        elif is_table:
            self.table = token_table(vocabulary.source, width) if table is None else table
        else:
            self.characters = CharacterConvolution(vocabulary.source, width, config, scale=scale)
        self.is_table = is_table and not self.is_frames

    def forward(self, source_BS: Tensor, lengths_B: Tensor) -> Tensor:
        """Map (B, S) ids or (B, S, F) frames, (B,) -> (B, S, D)."""
        if self.is_table:
            x_BSD: Tensor = self.table(source_BS)
            return x_BSD if self.scale == 1 else x_BSD * self.scale
        if self.is_frames:
            is_real_BS1 = is_real(lengths_B, source_BS.shape[1])[:, :, None]
            embedded: Tensor = self.norm(self.project(source_BS.masked_fill(~is_real_BS1, 0.0)))
            return embedded
        found: Tensor = self.characters(source_BS, lengths_B)
        return found
