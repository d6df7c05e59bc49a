"""L0 penalty on attention heads: the expected share of open gates (methods.md 82)."""

from collections.abc import Sequence
from typing import Any

from pydantic import NonNegativeFloat, PositiveFloat

from vinedresser.config import ModelConfig, TermConfig
from vinedresser.model import Seq2Seq
from vinedresser.nn.gates import expected_open_share, head_gates
from vinedresser.objective import Part, Pass, Term


class HeadPenaltyConfig(TermConfig):
    """Penalty on open attention heads, in nats per real target token."""

    # lambda: the penalty is lambda x expected share of open gates, so that one value means the same
    # for any number of layers and heads.
    weight: NonNegativeFloat = 0.1
    # Learning rate of the gates over the model's. After 700 updates at 1e-3 and lambda = 0.3, 0 of
    # 24 heads had closed at a factor of 10, 7 at 40.
    gate_lr_factor: PositiveFloat = 40.0

    def build(self, model: Seq2Seq) -> "HeadPenalty":
        """Return the penalty on a model's gates."""
        return HeadPenalty(model, self.gate_lr_factor)

    def check(self, model: ModelConfig) -> None:
        """See TermConfig."""
        if not getattr(model, "concrete_heads", ()):
            raise ValueError(
                "weight is above 0 but the model has no gates; set model.concrete_heads"
            )


class HeadPenalty(Term):
    """Expected share of open gates, once per update."""

    def __init__(self, model: Seq2Seq, gate_lr_factor: float) -> None:
        super().__init__()
        log_alphas = [gates.log_alpha for gates in head_gates(model)]
        # In a tuple: the gates stay parameters of the model alone.
        self._groups = (
            {
                "params": [alpha for alpha in log_alphas if alpha.requires_grad],
                "factor": gate_lr_factor,
                "weight_decay": 0.0,
            },
        )

    def forward(self, found: Pass) -> Part:
        """See Term."""
        return Part(expected_open_share(found.model))

    def model_groups(self) -> Sequence[dict[str, Any]]:
        """Return the gates, which learn faster and do not decay."""
        return self._groups
