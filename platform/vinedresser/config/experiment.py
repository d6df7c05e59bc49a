"""Experiment: one run as one frozen value, and the sections it is made of."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    model_validator,
)

from vinedresser.config.corpus import DataPath
from vinedresser.config.decoding import Decoding
from vinedresser.config.kinds import AnyModel
from vinedresser.config.section import Section
from vinedresser.config.task import SafeName, Task
from vinedresser.config.terms import Terms
from vinedresser.errors import ConfigError, reworded

Probability = Annotated[float, Field(ge=0, le=1)]
BatchOrder = Literal["alternating_max", "bucket_by_source", "random"]


def _read_task(value: Any, info: ValidationInfo) -> Any:
    """Read a task that is given as the name of its file or module."""
    if not isinstance(value, str):
        return value
    from vinedresser.config.files import resolve

    base = (info.context or {}).get("base")
    if base is not None and value.endswith((".yaml", ".yml", ".json")):
        value = str(Path(base) / value)
    try:
        return resolve(value, [Task])
    except ConfigError as error:
        # pydantic adds the line of the name in its file.
        raise ValueError("; ".join(error.args[0].splitlines())) from None


AnyTask = Annotated[Task, BeforeValidator(_read_task)]


class Optim(Section):
    """AdamW and its learning rate, a pure function of the step (training/optimizer.py)."""

    lr: PositiveFloat = 2e-3
    betas: tuple[Probability, Probability] = (0.9, 0.98)
    eps: PositiveFloat = 1e-9
    weight_decay: NonNegativeFloat = 0.0
    # Gradients above this global norm are scaled down to it (methods.md 75).
    clip_norm: PositiveFloat = 1.0
    # Updates of linear warm-up from 0 to `lr`.
    warmup_steps: NonNegativeInt = 100
    # After warm-up: constant, or ~ 1/sqrt(step). noam: warm-up and decay in one formula,
    # lr * d_model^-0.5 * min(step^-0.5, step * warmup_steps^-1.5), with lr = 1 in the paper
    # (Vaswani et al. 2017; methods.md 73); add anneal=0 to have it to the end.
    decay: Literal["constant", "inverse_sqrt", "noam"] = "constant"
    # Share of the run at its end over which the rate falls linearly to 0.
    anneal: Probability = 1 / 3
    # Parameters that stay as they are: patterns over their names with * and ?, for example
    # ["source_embedding*", "encoder*"], so that heads' functions do not move to the decoder when
    # they are pruned (methods.md 77). `vinedresser describe` prints the names. A tensor of two
    # names is frozen by either.
    freeze: tuple[str, ...] = ()
    # Updates with a loss or gradient that is not finite: each is skipped; one more ends the run.
    max_skipped: NonNegativeInt = 0
    # Times that a diverged run restarts from its last checkpoint at half the learning rate.
    rollbacks: NonNegativeInt = 0
    # Decay of the averaged weights that are evaluated and shipped; 0 switches averaging off.
    # Averaging gains 2 to 5 PER points before annealing and nothing after it.
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99


class Batching(Section):
    """Formation of batches from pairs."""

    # Padded tokens of a batch: sentences x max(source, target) length. Never exceeded.
    max_padded_tokens: Annotated[int, Field(ge=16)] = 4096
    # Batches in one update, over all workers, each worker taking its share; 0 is one per worker.
    # Named, it makes the updates of a run the same on any number of workers that divides it.
    per_update: NonNegativeInt = 0
    # Which rows share a batch (data/batching/plan.py). Real tokens at 4096 on Multi30k: 97 %, 96 %,
    # 46 %.
    order: BatchOrder = "alternating_max"
    # Parts of the data that are read side by side: batch i is of lane i mod lanes, so that a worker
    # reads the lanes of its own batches only. Name a multiple of the workers, above 8 of them; the
    # same batches then come on any number of workers. 1 is one order over all data. Lanes of less
    # than 250,000 rows pad more: 0.4 points at 250,000, 1 at 100,000, 4 at 20,000.
    lanes: PositiveInt = 1
    # Share of the train rows that are used, of all lengths alike; smaller shares are contained in
    # larger ones. A cheap fidelity for searches (methods.md 79).
    subset: Annotated[float, Field(gt=0, le=1)] = 1.0
    # Another segmentation of each text each time it is read, for bpe and unigram: the share of
    # merges that BPE drops, or unigram's smoothing (0.1 to 0.5 in Kudo 2018). 0 is off. Batches
    # then hold fewer rows, 0.55 of them at 0.1 with BPE, so that the budget holds.
    subword_alpha: Probability = 0.0


class Evaluation(Section):
    """Evaluation during training: decoded, on the dev split."""

    # Evaluations during the run; the last one is at its end.
    num_evaluations: PositiveInt = 4
    # Dev sentences that are decoded; 0 takes all.
    sentences: NonNegativeInt = 0
    # Pictures of the attention to the source, of one dev sentence, and dev/diagonality of up to 32
    # at every Nth evaluation: half a second each for 2 layers (methods.md 98). 0: none.
    attention_every: NonNegativeInt = 2


DeviceName = Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")]


class Devices(Section):
    """Encoder and decoder on devices of their own; batch and output layer are the decoder's."""

    encoder: DeviceName
    decoder: DeviceName


class Compute(Section):
    """Workers and devices of a run. They change results only by rounding."""

    workers: PositiveInt = 1
    # Smallest number of workers with which a run continues, a minute after a machine is lost; by
    # default it waits three minutes for another machine, then ends. The updates stay the same.
    min_workers: PositiveInt | None = None
    # CPU threads per worker.
    threads: PositiveInt = 1
    # GPUs that Ray reserves per worker; 0.5 lets two workers share one. auto: one (of `devices`,
    # those it names) where the cluster has GPUs or may add some, unless device is cpu. A worker
    # without a GPU sees none.
    gpus: Literal["auto"] | NonNegativeFloat = "auto"
    # Kind of those GPUs in Ray's names: T4, A100, H100, ...; by default any.
    accelerator: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    # Nodes of a group's workers: as few as possible, one, as many as possible, or one per worker.
    placement: Literal["pack", "strict_pack", "spread", "strict_spread"] = "pack"
    # Seconds to wait for resources: nodes that take the place of lost ones, or that the cluster is
    # still to add. By default 180 after a loss; a start that needs more than the cluster has is
    # refused at once, or waits 900 where Ray's autoscaler may add it.
    start_seconds: NonNegativeFloat | None = None
    # auto: cuda where there is one, else cpu.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Instead of `device`, for one worker: `{encoder: cuda:0, decoder: cpu}` (methods.md 36).
    # The metric train/seconds_per_step shows its cost.
    devices: Devices | None = None
    # auto: bf16 autocast where the processor or GPU has it, else fp32.
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    # Seconds without an update after which a worker of several counts as hung: all restart, with
    # their stacks in the run's folder; 0 never. The limit is at least ten times the longest update
    # so far, times 10 at checkpoints and times 30 at evaluations.
    hang_seconds: NonNegativeFloat = 60.0

    @model_validator(mode="after")
    def _check_gpus(self) -> Self:
        if self.gpus == "auto":
            return self
        if self.gpus > 1 and self.gpus % 1:
            raise ValueError(f"gpus {self.gpus:g}: more than one GPU is a whole number")
        if math.ceil(self.gpus) < self.cuda_devices:
            raise ValueError(
                f"gpus {self.gpus:g}, but the devices name {self.cuda_devices}; set gpus to auto"
            )
        if self.gpus and not self.may_use_gpu:
            raise ValueError(f"gpus {self.gpus:g}, but the devices name none; set gpus to 0")
        return self

    @model_validator(mode="after")
    def _check_devices(self) -> Self:
        if self.devices and self.device != "auto":
            raise ValueError("device and devices are both set; leave one of them out")
        if self.min_workers and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}")
        if self.devices and self.workers > 1:
            raise ValueError(
                f"devices splits one model, but each of {self.workers} workers has its own; "
                "set workers to 1"
            )
        return self

    @property
    def cuda_devices(self) -> int:
        """Return the number of GPUs that the devices of one worker name; `auto` names none."""
        if self.devices is None:
            return int(self.device == "cuda")
        names = [self.devices.encoder, self.devices.decoder]
        indices = [int(name.partition(":")[2] or 0) for name in names if name != "cpu"]
        return max(indices, default=-1) + 1

    @property
    def may_use_gpu(self) -> bool:
        """Return True if a worker computes on a GPU where there is one."""
        return self.cuda_devices > 0 or (self.device == "auto" and self.devices is None)


class Experiment(Section):
    """Everything that defines one training run; its JSON re-creates it."""

    name: SafeName = "experiment"
    # Written out, or the name of its YAML/JSON file or module.
    task: AnyTask
    model: AnyModel
    objective: Terms = Field(default_factory=Terms)
    optim: Optim = Optim()
    batch: Batching = Batching()
    evaluation: Evaluation = Evaluation()
    decoding: Decoding = Decoding()
    compute: Compute = Compute()
    # Optimizer updates of the whole run.
    steps: PositiveInt = 2000
    # Updates between two checkpoints; at the end the bundle replaces them.
    checkpoint_every: PositiveInt = 500
    # Number of the newest checkpoints that are kept. Each contains the best weights so far.
    keep_checkpoints: PositiveInt = 2
    # A model folder whose weights the run starts from (methods.md 76, 83).
    init: DataPath | None = None
    # Take from it what fits in name and shape, whatever the number of heads; by default everything
    # has to fit.
    init_partial: bool = False
    seed: NonNegativeInt = 1

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.optim.warmup_steps > self.steps:
            raise ValueError(
                f"optim.warmup_steps {self.optim.warmup_steps} is more than steps {self.steps}"
            )
        if self.optim.decay == "noam":
            if getattr(self.model, "d_model", None) is None:
                raise ValueError(
                    "optim.decay noam needs model.d_model, which this model does not have; set "
                    "optim.decay=inverse_sqrt and optim.lr"
                )
            if self.optim.warmup_steps == 0:
                raise ValueError("optim.decay noam with optim.warmup_steps 0; set 1 or more")
            # A peak rate of the other schedules, carried over.
            if self.optim.lr < 0.01:
                raise ValueError(
                    f"optim.lr {self.optim.lr:g} is the factor of the formula under optim.decay "
                    "noam, and makes it 100 times too small; set optim.lr=1"
                )
        if self.batches_per_update % self.compute.workers:
            raise ValueError(
                f"batch.per_update {self.batch.per_update} is no multiple of compute.workers "
                f"{self.compute.workers}; set it to {self.compute.workers} or a multiple"
            )
        if self.evaluation.num_evaluations > self.steps:
            raise ValueError(f"evaluation.num_evaluations is more than steps {self.steps}")
        for name, term in self.objective.active.items():
            with reworded(ValueError, ValueError, f"objective.{name}: "):
                term.check(self.model)
        return self

    @property
    def batches_per_update(self) -> int:
        """Return the number of batches per update over all workers."""
        return self.batch.per_update or self.compute.workers

    @property
    def batches_per_rank(self) -> int:
        """Return the number of batches per update of one worker."""
        return self.batches_per_update // self.compute.workers
