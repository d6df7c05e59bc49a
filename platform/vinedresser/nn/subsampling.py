"""Subsampling: a reduction shortens a sequence of states, and its lengths, by a factor.

Strided convolution, pooling, or concatenation of consecutive states (methods.md 25-29); between
recurrent layers they give the pyramidal encoder of Chan et al. 2016 (Listen, Attend and Spell).

B sentences, S positions, U positions left, D features.
"""

from typing import Annotated, Literal, Self, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from vinedresser.batch import is_real
from vinedresser.config.section import Section
from vinedresser.nn.attention import linear
from vinedresser.nn.convolution import windows

Count = TypeVar("Count", int, Tensor)


class SubsamplingConfig(Section):
    """`layers` reductions of the source, each by `factor`; `kind: none` has none."""

    # conv: relu of a strided convolution; pool: max or mean of each window; concat: consecutive
    # states side by side, zeros after the last.
    kind: Literal["none", "conv", "pool", "concat"] = "none"
    factor: PositiveInt = 2
    layers: PositiveInt = 2
    # conv only: width of the window and zeros on either side.
    kernel: PositiveInt = 3
    padding: Annotated[int, Field(ge=0)] = 1
    # pool only.
    pool: Literal["max", "mean"] = "mean"
    # pool only: ceil keeps the last, partial window (of its real positions only); floor drops it,
    # unless it is the only one.
    rounding: Literal["ceil", "floor"] = "ceil"

    @model_validator(mode="after")
    def _keeps_every_length(self) -> Self:
        if self.kind == "conv" and not self.kernel // 2 <= self.padding < self.kernel:
            raise ValueError(
                f"padding {self.padding} with kernel {self.kernel} loses short sentences or adds "
                f"positions without input; wanted {self.kernel // 2} to {self.kernel - 1}"
            )
        return self

    @property
    def reductions(self) -> int:
        """Return the number of reductions; 0 for `kind: none`."""
        return 0 if self.kind == "none" else self.layers

    def reduced(self, length: Count) -> Count:
        """Return the positions left by one reduction of `length` >= 1 positions; >= 1.

        conv: floor((T + 2 * padding - kernel) / factor) + 1; concat and pool with ceil:
        ceil(T / factor); pool with floor: max(1, floor(T / factor)). `none`: T.
        """
        if self.kind == "none":
            return length
        if self.kind == "conv":
            return (length + 2 * self.padding - self.kernel) // self.factor + 1
        if self.kind == "pool" and self.rounding == "floor":
            return length // self.factor + (length < self.factor)
        return (length + self.factor - 1) // self.factor


class Subsample(nn.Module):
    """One reduction: (B, S, D) -> (B, U, width). Neither batch mates nor padding change a state.

    Attributes:
        width: features that come out: `features_out` where it is given (a projection after pool
            and concat); else `features_in`, times the factor for concat.
    """

    def __init__(
        self, config: SubsamplingConfig, features_in: int, features_out: int | None = None
    ) -> None:
        super().__init__()
        if config.kind == "none":
            raise ValueError("kind: none has no reduction to build")
        self.config = config
        gathered = features_in
        if config.kind == "concat":
            gathered *= config.factor
        elif config.kind == "conv":
            gathered *= config.kernel
            features_out = features_out or features_in
        self.width = features_out or gathered
        # A convolution is the projection of its windows.
        is_projected = config.kind == "conv" or self.width != gathered
        self.project = linear(gathered, self.width) if is_projected else None

    def forward(self, x_BSD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, S, D), (B,) -> (B, U, width), (B,).

        U = `reduced(S)`; padding beyond the lengths is not read; outputs there are finite and
        otherwise undefined.
        """
        is_real_BS1 = is_real(lengths_B, x_BSD.shape[1])[:, :, None]
        if self.config.kind == "pool":
            x_BUD = self._pool(x_BSD, is_real_BS1)
        else:
            x_BUD = self._gather(x_BSD.masked_fill(~is_real_BS1, 0.0))
        if self.project is not None:
            x_BUD = self.project(x_BUD)
        if self.config.kind == "conv":
            x_BUD = F.relu(x_BUD)
        return x_BUD, self.config.reduced(lengths_B)

    def _gather(self, x_BSD: Tensor) -> Tensor:
        """Concatenate the inputs of each output, the first position's features first."""
        factor, S = self.config.factor, x_BSD.shape[1]
        if self.config.kind == "concat":
            U = self.config.reduced(S)
            return F.pad(x_BSD, (0, 0, 0, U * factor - S)).reshape(len(x_BSD), U, -1)
        kernel, padding = self.config.kernel, self.config.padding
        return windows(x_BSD, kernel, left=padding, right=padding, stride=factor)

    def _pool(self, x_BSD: Tensor, is_real_BS1: Tensor) -> Tensor:
        """Return max or mean over the real positions of each window; 0 where there are none."""
        factor, S = self.config.factor, x_BSD.shape[1]
        U = self.config.reduced(S)
        ends = (0, 0, 0, U * factor - S)  # negative where floor drops the last window
        counts_BU1 = F.pad(is_real_BS1, ends).reshape(len(x_BSD), U, factor, 1).sum(2)
        if self.config.pool == "mean":
            windows = F.pad(x_BSD.masked_fill(~is_real_BS1, 0.0), ends)
            total_BUD = windows.reshape(len(x_BSD), U, factor, -1).sum(2)
            return total_BUD / counts_BU1.clamp(min=1).to(x_BSD.dtype)
        lowest = torch.finfo(x_BSD.dtype).min
        windows = F.pad(x_BSD.masked_fill(~is_real_BS1, lowest), ends, value=lowest)
        largest_BUD = windows.reshape(len(x_BSD), U, factor, -1).amax(2)
        return largest_BUD.masked_fill(counts_BU1 == 0, 0.0)


class FrontEnd(nn.Module):
    """All reductions of a configuration in a row, each with `width` features in and out.

    Used before the layers of an encoder of constant width. Without reductions it is the identity.
    """

    def __init__(self, config: SubsamplingConfig, width: int) -> None:
        super().__init__()
        self.reductions = nn.ModuleList(
            Subsample(config, width, width) for _ in range(config.reductions)
        )

    def forward(self, x_BSD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, S, D), (B,) -> (B, U, D), (B,)."""
        for reduction in self.reductions:
            x_BSD, lengths_B = reduction(x_BSD, lengths_B)
        return x_BSD, lengths_B
