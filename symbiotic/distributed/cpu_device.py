"""The CPU as Megatron's accelerator: megatron-core unchanged on a machine without a GPU.

megatron-core never asks which device to use. It calls ``torch.cuda.*`` and writes ``device="cuda"``. On the
device ``cpu`` this module makes that surface answer for the CPU, for the whole process: streams and events are
empty, random state is the CPU generator's, a tensor made "on cuda" is made on the CPU. The factory functions
themselves are wrapped, because a ``TorchFunctionMode`` is not active inside the backward pass of a recomputed
layer.

Only a process that builds a Megatron model calls :func:`enter_cpu_device`, from its entry point and before
anything imports ``megatron.core`` (names such as ``torch.compile`` are bound while it is imported). There is no
way back: a process that needs the real ``torch.cuda`` is another process.
"""

import contextlib
import functools
import importlib.metadata
import logging
import os
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from symbiotic.distributed.cpu_collectives import with_uneven_parts, with_uneven_pieces
from symbiotic.distributed.cpu_optimizer import AdamW
from symbiotic.errors import LaunchError

log = logging.getLogger(__name__)

CPU = torch.device("cpu")

GPU_ONLY_PACKAGES = (
    "transformer_engine",
    "transformer_engine_torch",
    "apex",
    "amp_C",
    "fused_weight_gradient_mlp_cuda",
)
"""Packages whose kernels need a GPU. They are hidden, so that Megatron takes its own torch code instead."""

_FACTORIES = (
    "arange", "as_tensor", "asarray", "empty", "empty_like", "empty_permuted", "empty_strided", "eye", "full",
    "full_like", "linspace", "logspace", "ones", "ones_like", "rand", "rand_like", "randint", "randint_like",
    "randn", "randn_like", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
    "zeros_like",
)  # fmt: skip
_TENSOR_METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")

_entered = False


def choose_device(name: str) -> str:
    """The device of a run, ``cpu`` or ``cuda``; ``auto`` takes the GPU where there is one and says so in the log.

    Raises:
        LaunchError: the name is unknown, or ``cuda`` is asked for and torch sees no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise LaunchError(f"run.device is {name!r}, which is no device; set it to auto, cpu or cuda")
    if name == "cuda" and (_entered or not torch.cuda.is_available()):
        raise LaunchError(
            f"run.device is cuda, but torch {torch.__version__} sees no GPU in this process; set run.device=cpu, "
            "or check nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        log.info("run.device is auto: using %s", name)
    return name


def is_cpu_device() -> bool:
    """Whether this process has entered the CPU device."""
    return _entered


def enter_cpu_device() -> None:
    """Make this process run megatron-core on the CPU, then import it. Calling it again does nothing.

    Raises:
        LaunchError: ``megatron.core`` was imported before, so that some of its names are already bound to CUDA.
    """
    global _entered
    if _entered:
        return
    if "megatron.core" in sys.modules:
        raise LaunchError(
            "the CPU device was entered after megatron.core had been imported; call "
            "symbiotic.distributed.cpu_device.enter_cpu_device() first in the entry point"
        )
    _entered = True
    # torch.optim imports it sooner or later, and it lists the functions of torch.cuda: the real ones, by then.
    import torch._dynamo

    for package in GPU_ONLY_PACKAGES:
        sys.modules.setdefault(package, None)  # None makes `import package` raise ImportError
    _answer_for_cuda()
    _redirect_tensors_to_cpu()
    # Compiling costs minutes for functions of milliseconds here, and needs a C++ compiler at run time.
    torch.compile = _without_compiling
    _adapt_megatron()


def _redirect_device(value: Any) -> Any:
    """``value`` with any spelling of a CUDA device replaced by the CPU; every other value as it is."""
    if isinstance(value, torch.device):
        return CPU if value.type == "cuda" else value
    if isinstance(value, str) and value.startswith("cuda"):
        return CPU
    return value


def _redirected(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its ``device`` argument redirected and memory pinning left out."""

    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            device = kwargs["device"]
            # A bare number is a CUDA device as well: torch.cuda.current_device() on a GPU returns one.
            kwargs["device"] = CPU if isinstance(device, int) else _redirect_device(device)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return on_cpu


def _redirect_tensors_to_cpu() -> None:
    """Wrap torch's tensor factories and the tensor methods that name a device."""
    for name in _FACTORIES:
        setattr(torch, name, _redirected(getattr(torch, name)))
    for name in _TENSOR_METHODS:
        setattr(torch.Tensor, name, _redirected(getattr(torch.Tensor, name)))

    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(tensor_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            args = (_redirect_device(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _redirect_device(kwargs["device"])
        return tensor_to(self, *args, **kwargs)

    @functools.wraps(tensor_type)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Megatron sorts parameters by names such as 'torch.cuda.FloatTensor'.
        if dtype is None:
            return tensor_type(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return tensor_type(self, dtype, *args, **kwargs)

    torch.Tensor.to = to
    torch.Tensor.type = type_
    torch.Tensor.cuda = lambda self, device=None, non_blocking=False, memory_format=None: self
    torch.Tensor.pin_memory = lambda self, device=None: self
    torch.Tensor.record_stream = lambda self, stream: None


class _Stream:
    """A CUDA stream on the CPU: work is done when the call returns, so there is one stream and nothing to wait for."""

    cuda_stream = 0
    device = CPU
    device_index = 0
    priority = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exception: object) -> None: ...
    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def synchronize(self) -> None: ...
    def wait_stream(self, stream: "_Stream") -> None: ...
    def wait_event(self, event: "_Event") -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        event = event or _Event()
        event.record()
        return event


class _Event:
    """A CUDA event on the CPU: recording it takes the time of day."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = 0.0

    def record(self, stream: _Stream | None = None) -> None:
        self._time = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        """Milliseconds between two records."""
        return 1000.0 * (end._time - self._time)

    def synchronize(self) -> None: ...
    def wait(self, stream: _Stream | None = None) -> None: ...
    def query(self) -> bool:
        return True


class _DeviceContext:
    """``with torch.cuda.device(i)`` and ``with torch.cuda.stream(s)``: nothing to switch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *exception: object) -> None: ...


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    """The state of the CPU generator, which is the only generator on this device."""
    return torch.default_generator.get_state()


def _set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for calls that have no meaning without a GPU."""


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


def _false(*args: Any, **kwargs: Any) -> bool:
    return False


def _device_properties(*args: Any, **kwargs: Any) -> SimpleNamespace:
    total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return SimpleNamespace(
        name="cpu", major=0, minor=0, multi_processor_count=os.cpu_count() or 1, total_memory=total_memory
    )


_CUDA_ANSWERS: dict[str, Any] = {
    "is_available": _false,
    "is_initialized": _false,
    "is_current_stream_capturing": _false,
    "init": _nothing,
    "_lazy_init": _nothing,
    "_lazy_call": lambda callback, **kwargs: callback(),
    "device_count": _zero,
    "current_device": lambda: CPU,
    "set_device": _nothing,
    "device": _DeviceContext,
    "get_device_name": lambda device=None: "cpu",
    "get_device_capability": lambda device=None: (0, 0),
    "get_device_properties": _device_properties,
    "cudart": lambda: SimpleNamespace(cudaProfilerStart=_zero, cudaProfilerStop=_zero),
    "Stream": _Stream,
    "Event": _Event,
    "stream": _DeviceContext,
    "current_stream": lambda device=None: _Stream(),
    "default_stream": lambda device=None: _Stream(),
    "set_stream": _nothing,
    "synchronize": _nothing,
    "empty_cache": _nothing,
    "ipc_collect": _nothing,
    "memory_stats": lambda device=None: defaultdict(int),
    "memory_allocated": _zero,
    "memory_reserved": _zero,
    "max_memory_allocated": _zero,
    "max_memory_reserved": _zero,
    "reset_peak_memory_stats": _nothing,
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "manual_seed": _manual_seed,
    # torch.manual_seed() calls this one after seeding the CPU generator itself.
    "manual_seed_all": _nothing,
    "default_generators": (torch.default_generator,),
}


def _answer_for_cuda() -> None:
    """Replace what Megatron uses of ``torch.cuda``, ``torch.accelerator`` and of collectives that gloo hasn't whole."""
    for name, answer in _CUDA_ANSWERS.items():
        setattr(torch.cuda, name, answer)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda.random, name, _CUDA_ANSWERS[name])
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _nothing)
    # DataLoader asks the accelerator whether it should pin memory.
    torch.accelerator.is_available = _false
    torch.accelerator.device_count = _zero
    torch.accelerator.current_accelerator = _nothing

    barrier = dist.barrier

    @functools.wraps(barrier)
    def barrier_without_devices(
        group: dist.ProcessGroup | None = None, async_op: bool = False, device_ids: list[int] | None = None
    ) -> dist.Work | None:
        return barrier(group=group, async_op=async_op)

    dist.barrier = barrier_without_devices
    dist.all_gather = with_uneven_parts(dist.all_gather)
    dist.reduce_scatter = with_uneven_pieces(dist.reduce_scatter)


def _without_compiling(model: Callable[..., Any] | None = None, **options: Any) -> Any:
    """``torch.compile`` as a decorator that leaves the function as it is."""
    return (lambda function: function) if model is None else model


def _split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """``moe_utils.maybe_move_tensor_to_cpu`` for a tensor that is on the CPU already.

    The original converts to numpy only what comes from a GPU, but all_to_all_single needs numbers either way.
    """
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


_MEGATRON_REPLACEMENTS: dict[tuple[str, str], Any] = {
    ("megatron.core.tensor_parallel.random", "_get_cuda_rng_state"): _get_rng_state,
    ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state"): _set_rng_state,
    ("megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu"): _split_sizes,
    # Megatron treats an Adam that keeps its step in the parameter group as apex's: see cpu_optimizer.
    ("megatron.core.optimizer", "Adam"): AdamW,
    ("megatron.core.optimizer", "USING_PYTORCH_OPTIMIZER"): False,
    ("megatron.core.optimizer.distrib_optimizer", "HAVE_APEX_OR_TE"): True,
    ("megatron.core.optimizer.distrib_optimizer", "USING_APEX_OPTIMIZER"): True,
}

PRIVATE_NAMES = tuple(_MEGATRON_REPLACEMENTS)
"""Every name inside Megatron that this module replaces, as (module, name); a test checks that each exists."""


def _adapt_megatron() -> None:
    """Import megatron-core and replace the names of PRIVATE_NAMES."""
    with _without_gpu_warnings():
        import megatron.core.models.hybrid.hybrid_model
        import megatron.core.models.mimo.model.base  # noqa: F401  (get_megatron_optimizer imports it)
    for (module_name, name), replacement in _MEGATRON_REPLACEMENTS.items():
        module = importlib.import_module(module_name)
        if not hasattr(module, name):
            raise LaunchError(
                f"megatron-core {importlib.metadata.version('megatron-core')} has no {module_name}.{name}, which the "
                "device cpu replaces; install megatron-core>=0.19.2,<0.20"
            )
        setattr(module, name, replacement)
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_SharedGeneratorFilter())


@contextlib.contextmanager
def _without_gpu_warnings() -> Iterator[None]:
    """Leave out what megatron-core says on import about missing GPU libraries: here that is the intended state."""
    extensions = logging.getLogger("torch.utils.cpp_extension")
    level = extensions.level
    extensions.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed.*")
            warnings.filterwarnings("ignore", message=".*MimoModelConfig is experimental.*")
            yield
    finally:
        extensions.setLevel(level)


class _SharedGeneratorFilter(logging.Filter):
    """Drops Megatron's warning that the CPU's random state moved while the GPU's was forked: here they are one."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()
