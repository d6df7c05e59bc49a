"""Device, precision, threads and seeds of one worker of a run."""

import ctypes
import logging
import os
import resource
import sys
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from vinedresser.config import Compute, ModelConfig
from vinedresser.errors import ConfigError, MachineError
from vinedresser.model import Vocabulary

_log = logging.getLogger(__name__)


def refuse_too_large(config: ModelConfig, vocabulary: Vocabulary) -> None:
    """Refuse a model whose weights are larger than the memory, before they are allocated.

    The model is built on the meta device, without storage: the system may end a process that fills
    the memory before any allocation fails.

    Raises:
        ConfigError: the required and the available memory.
    """
    try:
        with torch.device("meta"):
            parameters = config.instantiate(vocabulary).parameters()
        required = sum(p.numel() * p.element_size() for p in parameters)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        if "meta tensor" in str(error):  # the constructor reads values of its tensors
            return
        raise ConfigError(f"model: {' '.join(str(error).split())[:300]}") from None
    available = psutil.virtual_memory().total
    if required > available:
        raise ConfigError(
            f"model: the weights take {required / 1e9:,.0f} GB, this machine has "
            f"{available / 1e9:,.0f} GB; choose smaller sizes"
        )


@dataclass(frozen=True)
class Device:
    """The device, precision and rank of one worker of a run.

    Attributes:
        primary: the device of the weights, of the batch and of the loss.
        autocast_dtype: bfloat16, or None for plain fp32.
        rank: this worker, 0-based.
        world_size: number of workers.
        encoder: a device for the encoder's weights alone (methods.md 36); None for `primary`.
    """

    primary: torch.device
    autocast_dtype: torch.dtype | None
    rank: int = 0
    world_size: int = 1
    encoder: torch.device | None = None

    @property
    def encoder_device(self) -> torch.device:
        """Return the device of the encoder's weights."""
        return self.encoder or self.primary

    @property
    def settings(self) -> dict[str, str | int]:
        """Return what the bits of a run depend on, apart from its experiment."""
        return {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "workers": self.world_size,
            "device": self.primary.type,
            "precision": str(self.autocast_dtype or torch.float32).removeprefix("torch."),
        }

    def autocast(self) -> AbstractContextManager[object]:
        """Return the precision context of a training step."""
        if self.autocast_dtype is None:
            return nullcontext()
        stack = ExitStack()
        for name in sorted({self.primary.type, self.encoder_device.type}):
            stack.enter_context(torch.autocast(name, self.autocast_dtype))
        return stack

    def all_sum(self, values: Tensor) -> Tensor:
        """Return the sum over ranks, on every rank; a barrier."""
        if self.world_size == 1:
            return values
        summed = values.to(self.primary, copy=True)
        dist.all_reduce(summed)
        return summed


def has_bf16(device: torch.device) -> bool:
    """Return true if bf16 matrix products are native: 4 to 5 times the speed of fp32."""
    if device.type == "cuda":
        # Before Ampere the products are emulated, slower than fp32.
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_device(compute: Compute, *, rank: int = 0) -> Device:
    """Resolve `auto` on this machine and set the number of threads.

    Raises:
        MachineError: a configured device is not on this machine, or emulates the precision.
    """
    has_cuda, encoder = torch.cuda.is_available(), None
    if compute.device == "cuda" and not has_cuda:
        raise MachineError("compute.device is cuda but no GPU is here; use compute.device=cpu")
    device = torch.device("cpu")
    if has_cuda and compute.device != "cpu" and compute.gpus != 0:
        # The one assigned to this process: workers of a group see all GPUs of their machine.
        device = torch.device("cuda", torch.cuda.current_device())
    if compute.devices:
        device, encoder = (_device(n) for n in (compute.devices.decoder, compute.devices.encoder))
    torch.set_num_threads(compute.threads)
    _keep_freed_memory()
    if compute.precision == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise MachineError(
            f"compute.precision is bf16, which {torch.cuda.get_device_name(device)} only emulates; "
            "use compute.precision=fp32 or auto"
        )
    is_native = has_bf16(device) and (encoder is None or has_bf16(encoder))
    is_bf16 = compute.precision == "bf16" or (compute.precision == "auto" and is_native)
    return Device(device, torch.bfloat16 if is_bf16 else None, rank, compute.workers, encoder)


def _device(name: str) -> torch.device:
    """Return a device of compute.devices.

    Raises:
        MachineError: this machine does not have it.
    """
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise MachineError(f"compute.devices names {name}, this machine has {count} GPUs; use cpu")
    return device


def _keep_freed_memory() -> None:
    """Keep freed memory in the process (glibc): 1.08 times the speed in fp32, 1.19 in bf16.

    Also enable huge pages, 1.04 to 1.1 times; torch reads the variable at its first tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        _log.debug("no glibc: allocator settings unchanged")


def seed_step(seed: int, step: int, number: int) -> int:
    """Make every random draw of a batch a pure function of (seed, step, its number in the update).

    A resumed run draws the same numbers as an uninterrupted one without stored state, and so does
    a run on another number of workers. Returns the seed of torch's global generator.
    """
    # Odd multipliers spread neighbouring triples over the 64-bit seeds (Weyl sequence).
    mixed = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + number * 0x94D049BB133111EB
    mixed &= 0x7FFF_FFFF_FFFF_FFFF
    torch.manual_seed(mixed)
    return mixed


def is_out_of_memory(error: BaseException) -> bool:
    """Return true if an allocation failed: on a GPU, in torch's CPU allocator, or in C++."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("can't allocate memory", "bad_alloc")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def peak_memory() -> str:
    """Return the peak memory of this process, for messages."""
    # KiB on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    text = f"{peak / 2**30:.1f} GiB of memory"
    if torch.cuda.is_available():
        text += f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory"
    return text
