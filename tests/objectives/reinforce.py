"""A term of a user's package: REINFORCE with a learned baseline, for test_terms.py."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from pydantic import PositiveFloat
from torch import nn

from vinedresser.config import MetricName, TermConfig
from vinedresser.model import Seq2Seq
from vinedresser.objective import Part, Pass, Term
from vinedresser.special_ids import EOS, PAD


class ReinforceConfig(TermConfig):
    """Expected error of sampled outputs."""

    metric: MetricName = "per"
    lr: PositiveFloat = 0.05

    def build(self, model: Seq2Seq) -> "Reinforce":
        return Reinforce(self, model)


class Reinforce(Term):
    """-(reward - baseline) log p of one sample per sentence; the baseline reads the source."""

    def __init__(self, config: ReinforceConfig, model: Seq2Seq) -> None:
        super().__init__()
        self._config = config
        self.baseline = nn.Linear(model.output.weight.shape[1], 1)
        self.register_buffer("sentences", torch.zeros((), dtype=torch.int64))

    def forward(self, found: Pass) -> Part:
        batch, model = found.batch, found.model
        sampled = found.decode(found.generator())
        reward_B = -found.sentence_scores(self._config.metric, sampled) / 100
        self.sentences += len(reward_B)
        mask_BS1 = found.memory.is_real_BS[..., None]
        mean_BD = (found.memory.states_BSD * mask_BS1).sum(1) / mask_BS1.sum(1)
        off_B = reward_B - self.baseline(mean_BD.detach())[:, 0]
        rows = [torch.tensor([*ids, EOS]) for ids in sampled]
        target_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        own = replace(batch, target_BT=target_BT.to(model.device))
        states_BTD = model.decode(found.memory, own.inputs_BT, own.is_real_BT)
        log_p_BTV = model.output.log_probs(states_BTD)
        log_p_BT = log_p_BTV.gather(2, own.target_BT[..., None])[..., 0] * own.is_real_BT
        total = -(off_B.detach() * log_p_BT.sum(1)).sum() + off_B.square().sum()
        return Part(total, batch.tokens)

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self._config.lr, momentum=0.9)

    def metrics(self, step: int) -> Mapping[str, float]:
        return {"baseline_rate": self._config.lr}
