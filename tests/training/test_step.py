"""Optimizer updates: gradients, seeds, accumulation, memory, devices."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.batches import pad_ids
from trainables.transformer import TransformerConfig
from vinedresser.batch import Batch
from vinedresser.config import Compute, Experiment, Optim, Terms
from vinedresser.errors import (
    ConfigError,
    MachineError,
)
from vinedresser.model import Seq2Seq, Vocabulary
from vinedresser.nn.gates import HeadGates, expected_open_share
from vinedresser.objective import Objective
from vinedresser.objectives.likelihood import ScheduledSampling
from vinedresser.special_ids import EOS
from vinedresser.training.device import Device, resolve_device, seed_step
from vinedresser.training.optimizer import OptimizerState, build_optimizer, freeze
from vinedresser.training.step import Step, training_steps

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = Device(torch.device("cpu"), None)
TINY = {"d_model": 16, "d_ff": 32, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
ROWS = [[4, 5, 6, 7, 8, EOS], [5, EOS], [6, 6, EOS], [7, 4, EOS], [EOS], [8, 7, 6, EOS]]


def experiment(**changes: object) -> Experiment:
    corpus = {"train": {"source": "a", "target": "b"}, "dev": {"source": "c", "target": "d"}}
    task = {"name": "t", "corpus": corpus, "tokenizer": {"kind": "symbols"}, "metric": "per"}
    base = Experiment.from_json({"task": task, "model": {"kind": "transformer", **TINY}})
    return base.override(
        {"steps": 8, "optim.warmup_steps": 0, "evaluation.num_evaluations": 1, **changes}
    )


def built(config: Experiment, seed: int = 0) -> Seq2Seq:
    torch.manual_seed(seed)
    return config.model.build(Vocabulary(10, 10))


def batch_of(rows: list[list[int]]) -> Batch:
    padded = pad_ids(rows)
    return Batch(*padded, *padded, torch.arange(len(rows)))


def endless() -> Iterator[Batch]:
    while True:
        yield batch_of(ROWS[:3])
        yield batch_of(ROWS[3:])


def trained(config: Experiment, *, device: Device = HERE) -> tuple[Seq2Seq, list[Step]]:
    model = built(config)
    objective = Objective(config.objective, model)
    optimizer = build_optimizer(objective, config.optim)
    return model, list(training_steps(objective, endless(), optimizer, config, device=device))


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class TestGradients:
    def gradient(self, terms: Terms, parts: list[tuple[Batch, float]]) -> list[torch.Tensor]:
        """Averaged over parts, as data-parallel training does; each part has its divisor."""
        gated = experiment(**{"model.concrete_heads": ["enc_self"]})
        model = built(gated).eval()
        objective = Objective(terms, model)
        for batch, tokens in parts:
            _, loss = objective(batch, torch.tensor(tokens), step=1, seed=0)
            (loss / len(parts)).backward()
        return [p.grad.clone() for p in model.parameters()]

    @pytest.mark.parametrize("l0", [0.0, 0.7])
    def test_ranks_with_unequal_tokens_equal_one_whole_batch(self, l0):
        terms = Terms.from_json(
            {"likelihood": {"label_smoothing": 0.1}, "head_penalty": {"weight": l0}}
        )
        whole, left, right = batch_of(ROWS), batch_of(ROWS[:1]), batch_of(ROWS[1:])
        total = float(whole.tokens)
        assert float(left.tokens) != float(right.tokens)
        wanted = self.gradient(terms, [(whole, total)])
        found = self.gradient(terms, [(left, total / 2), (right, total / 2)])
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        own = [(left, float(left.tokens)), (right, float(right.tokens))]  # means of means
        naive = self.gradient(terms, own)
        assert max(float((a - b).abs().max()) for a, b in zip(naive, wanted, strict=True)) > 1e-3

    def test_what_is_reported_is_the_sum_of_nats_alone(self):
        model = built(experiment(**{"model.concrete_heads": ["enc_self"]})).eval()
        batch = batch_of(ROWS)
        terms = Terms.from_json({"head_penalty": {"weight": 2.0}})
        nll, loss = Objective(terms, model)(batch, batch.tokens, step=1, seed=0)
        share = expected_open_share(model).item()
        assert loss.item() == pytest.approx(nll.item() / int(batch.tokens) + 2 * share, rel=1e-6)
        assert not nll.requires_grad


class TestSteps:
    def test_sampling_at_p_0_is_bit_identical_to_teacher_forcing(self):
        plain, _ = trained(experiment())
        off = experiment(
            **{
                "objective.likelihood.sampling": {
                    "probability": 0.0,
                    "decay": "constant",
                    "decay_steps": 3,
                }
            }
        )
        assert same_weights(trained(off)[0], plain)
        on = experiment(
            **{"objective.likelihood.sampling": {"probability": 0.5, "decay": "constant"}}
        )
        assert not same_weights(trained(on)[0], plain)

    def test_a_run_is_a_function_of_its_seed(self):
        one, again, other = (trained(experiment(seed=s))[0] for s in (1, 1, 2))
        assert same_weights(one, again)
        assert not same_weights(one, other)

    def test_a_run_in_two_halves_is_the_run(self):
        config = experiment(
            **{"objective.likelihood.sampling": {"probability": 0.5, "decay_steps": 4}}
        )
        whole, steps = trained(config)
        model = built(config)
        objective = Objective(config.objective, model)
        optimizer = build_optimizer(objective, config.optim)
        source = endless()
        torch.manual_seed(99)
        first = training_steps(objective, source, optimizer, config, device=HERE)
        halves = [next(first) for _ in range(4)]
        torch.manual_seed(77)
        halves += training_steps(objective, source, optimizer, config, device=HERE, start=4)
        assert same_weights(model, whole)
        assert [s.index for s in halves] == [s.index for s in steps] == list(range(1, 9))

    def test_each_step_tells_its_rate_share_and_tokens(self):
        sampling = ScheduledSampling(probability=0.8, decay_steps=8)
        config = experiment(
            **{
                "optim.warmup_steps": 2,
                "optim.anneal": 0,
                "objective.likelihood.sampling": sampling.to_json(),
            }
        )
        _, steps = trained(config)
        rate = config.optim.lr
        assert [s.learning_rate for s in steps] == pytest.approx([rate / 2] + [rate] * 7)
        assert [s.metrics["teacher_forcing_ratio"] for s in steps] == pytest.approx(
            [1 - 0.1 * i for i in range(8)]
        )
        assert [int(s.tokens) for s in steps[:2]] == [11, 8]

    def test_gradients_are_clipped_to_the_norm(self):
        config = experiment(steps=1, **{"optim.clip_norm": 0.01})
        model = built(config)
        objective = Objective(config.objective, model)
        optimizer = build_optimizer(objective, config.optim)
        (step,) = training_steps(objective, endless(), optimizer, config, device=HERE)
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        assert float(step.gradient_norm) > 0.01
        assert float(norm) == pytest.approx(0.01, rel=1e-3)

    def test_bf16_learns_too(self):
        config = experiment(steps=60, **{"optim.lr": 5e-3, "model.dropout": 0})
        _, steps = trained(config, device=Device(torch.device("cpu"), torch.bfloat16))
        assert float(steps[-1].nll) < 0.5 * float(steps[1].nll)

    def test_a_rank_draws_its_own_numbers(self):
        def drawn(seed: int, step: int, rank: int) -> float:
            seed_step(seed, step, rank)
            return float(torch.rand(()))

        triples = [(s, t, r) for s in range(3) for t in range(30) for r in range(3)]
        values = [drawn(*triple) for triple in triples]
        assert len(set(values)) == len(values)
        torch.rand(5)
        assert [drawn(*triple) for triple in reversed(triples)] == values[::-1]


class Poisoned:
    """Batches of which some make the gradient NaN, by a weight that is NaN while they pass."""

    def __init__(self, model: Seq2Seq, at: set[int]) -> None:
        self.model, self.at = model, at

    def __iter__(self) -> Iterator[Batch]:
        weight = next(self.model.parameters())
        for index, batch in enumerate(endless(), 1):
            hook = None
            if index in self.at:
                hook = weight.register_hook(lambda grad: grad * math.nan)
            yield batch
            if hook is not None:
                hook.remove()


def test_a_gradient_that_is_not_finite_never_reaches_weights_or_moments():
    config = experiment(**{"optim.anneal": 0})
    model = built(config)
    objective = Objective(config.objective, model)
    optimizer = build_optimizer(objective, config.optim)
    steps = training_steps(objective, iter(Poisoned(model, {3})), optimizer, config, device=HERE)
    next(steps), next(steps)
    before = [p.detach().clone() for p in model.parameters()]
    state = OptimizerState(optimizer)
    kept = {k: v.clone() for k, v in state.state_dict().items()}
    assert not math.isfinite(float(next(steps).gradient_norm))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    after = state.state_dict()
    assert all(torch.equal(kept[name], after[name]) for name in kept)
    assert math.isfinite(float(next(steps).gradient_norm))
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class TestOutOfMemory:
    def trained(self, limit: int, error: Exception, steps: int = 1) -> tuple[Seq2Seq, list[Step]]:
        """A run in which a pass over more than `limit` padded tokens raises."""
        config = experiment(
            **{"model.dropout": 0, "model.attention_dropout": 0, "optim.clip_norm": 1e9}
        ).override({"steps": steps})
        model = built(config)
        whole = model.encode

        def encode(source_BS: torch.Tensor, lengths_B: torch.Tensor) -> object:
            if source_BS.numel() > limit:
                raise error
            return whole(source_BS, lengths_B)

        model.encode = encode
        objective = Objective(config.objective, model)
        optimizer = build_optimizer(objective, config.optim)
        return model, list(training_steps(objective, endless(), optimizer, config, device=HERE))

    @pytest.mark.fault("T03")
    @pytest.mark.parametrize(
        "error",
        [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 GB")],
    )
    def test_batches_go_in_parts_with_the_same_gradients(self, error, caplog):
        plain, wanted = self.trained(10**6, error)
        assert not caplog.records
        parted, found = self.trained(12, error)
        assert "out of memory at 3 x 6 source and 3 x 6 target tokens" in caplog.text
        assert float(found[0].nll) == pytest.approx(float(wanted[0].nll), rel=1e-6)
        assert int(found[0].tokens) == int(wanted[0].tokens)
        for a, b in zip(parted.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5)

    def test_once_found_the_limit_stays(self, caplog):
        _, steps = self.trained(12, torch.OutOfMemoryError("CUDA out of memory"), steps=6)
        assert len(steps) == 6
        assert len(caplog.records) == 1

    def test_a_single_row_that_does_not_fit_is_told(self):
        with pytest.raises(
            MachineError, match=r"out of memory at 1 x 6 .*GiB.*lower batch.max_padded_tokens"
        ):
            self.trained(2, torch.OutOfMemoryError("CUDA out of memory"))

    def test_other_errors_pass(self):
        with pytest.raises(RuntimeError, match="shape"):
            self.trained(2, RuntimeError("shape mismatch"))


class TestAccumulation:
    @pytest.mark.parametrize("l0", [0.0, 0.5])
    def test_two_batches_per_update_are_one_large_batch(self, l0):
        """methods.md 34, through the real loop; the penalty counts once."""
        changes = {
            "model.dropout": 0,
            "model.attention_dropout": 0,
            "model.concrete_heads": ["enc_self"],
            "objective.head_penalty.weight": l0,
            "steps": 1,
            "optim.clip_norm": 1e9,
        }

        def gradient(batches: list[Batch], per_update: int) -> list[torch.Tensor]:
            config = experiment(**changes, **{"batch.per_update": per_update})
            model = built(config)
            for gate in model.modules():
                if isinstance(gate, HeadGates):
                    gate.eval()  # no noise, which would differ by batch
            objective = Objective(config.objective, model)
            optimizer = build_optimizer(objective, config.optim)
            list(training_steps(objective, iter(batches), optimizer, config, device=HERE))
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        whole = gradient([batch_of(ROWS)], 1)
        parted = gradient([batch_of(ROWS[:1]), batch_of(ROWS[1:])], 2)
        for a, b in zip(parted, whole, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)

    def test_an_update_that_is_not_whole_is_not_made(self):
        config = experiment(**{"batch.per_update": 2})
        model = built(config)
        objective = Objective(config.objective, model)
        optimizer = build_optimizer(objective, config.optim)
        three = iter([batch_of(ROWS)] * 3)
        assert len(list(training_steps(objective, three, optimizer, config, device=HERE))) == 1

    def test_workers_must_divide_what_they_share(self):
        with pytest.raises(ConfigError, match=r"per_update 3 is no multiple .* 2; set it to 2"):
            experiment(**{"batch.per_update": 3, "compute.workers": 2})
        config = experiment(**{"batch.per_update": 6, "compute.workers": 2})
        assert (config.batches_per_update, config.batches_per_rank) == (6, 3)
        assert experiment(**{"compute.workers": 3}).batches_per_update == 3


class TestFreezing:
    def test_frozen_tensors_stay_bit_identical_and_the_rest_moves(self):
        config = experiment(**{"optim.freeze": ["source_embedding*", "encoder.*"]})
        model = built(config)
        frozen = freeze(model, config.optim.freeze)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        objective = Objective(config.objective, model)
        optimizer = build_optimizer(objective, config.optim)
        list(training_steps(objective, endless(), optimizer, config, device=HERE))
        assert frozen
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) == (name in frozen), name

    def test_a_pattern_that_names_nothing_is_an_error(self):
        with pytest.raises(ConfigError, match=r"no parameter is named encodr\.\*"):
            freeze(built(experiment()), ["encodr.*"])
        with pytest.raises(ConfigError, match="covers every parameter"):
            freeze(built(experiment()), ["*"])


class TestDevice:
    def test_a_worker_computes_on_the_gpu_that_it_was_given(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        assert resolve_device(Compute(workers=4), rank=1).primary == torch.device("cuda", 3)
        assert resolve_device(Compute(workers=4, device="cpu"), rank=1).primary == torch.device(
            "cpu"
        )

    def test_resolves_what_is_here(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        found = resolve_device(Compute(threads=1, precision="fp32", workers=2), rank=1)
        assert found == Device(torch.device("cpu"), None, 1, 2)
        assert resolve_device(Compute(precision="bf16")).autocast_dtype is torch.bfloat16

    def test_refuses_what_is_not(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(MachineError, match=r"compute\.device=cpu"):
            resolve_device(Compute(device="cuda"))


def test_bf16_that_a_gpu_only_emulates_is_refused_or_not_chosen(monkeypatch) -> None:
    """A GPU of before Ampere, none of which is at hand: what torch answers there."""
    answers = {
        "is_available": lambda: True, "current_device": lambda: 0,
        "get_device_name": lambda _: "Tesla T4",
        "is_bf16_supported": lambda including_emulation=True: including_emulation,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    assert resolve_device(Compute()).autocast_dtype is None
    with pytest.raises(MachineError, match="bf16, which Tesla T4 only emulates"):
        resolve_device(Compute(precision="bf16"))


def test_defaults_build():
    assert isinstance(experiment().optim, Optim)
    assert isinstance(experiment().model, TransformerConfig)
