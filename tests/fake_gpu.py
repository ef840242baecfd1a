"""A GPU for machines without one: tensors with values, on which all that a real GPU refuses is refused.

`with FakeGpu() as gpu:` makes torch believe in one GPU. Its tensors lie in host memory, in storages marked as the
GPU's; every operation looks at the marks of what it is given. So whole commands run, by the branches that only a GPU
takes. What torch does inside an operation stays that of the CPU: no kernel of a real GPU is tested here.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Operations whose result's shape or value the host has to know.
_READS = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.repeat_interleave, aten.bincount),
    *(aten._unique2, aten.unique_consecutive, aten.unique_dim, aten._linalg_check_errors),
}
_INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
# Beside pointwise ones, those that take a scalar in host memory.
_SCALARS = {aten.fill, aten.fill_, aten.masked_fill, aten.masked_fill_, aten.where}
_MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}
_ALIASES = {torch.as_tensor, torch.asarray}

# What adds up in changing order on CUDA, by the list of `torch.use_deterministic_algorithms`; `cumsum` of integers not.
_CHANGING = {
    *("index_add", "index_add_", "scatter_add", "scatter_add_", "put_", "histc", "kthvalue", "median", "cumsum"),
    *("grid_sampler_2d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "nll_loss2d"),
    *("reflection_pad2d_backward", "replication_pad2d_backward", "_adaptive_avg_pool2d_backward"),
    *("adaptive_max_pool2d_backward", "_embedding_bag_backward", "_embedding_bag_dense_backward"),
}

_Generator, _autocast = torch.Generator, torch.autocast
_parse_to, _run_backward = torch._C._nn._parse_to, torch.autograd._engine_run_backward


class FakeGpu:
    """One fake GPU, `cuda:0` or `mps:0`, as a context.

    kind: "cuda" or "mps"; the latter refuses float64. memory: bytes that are free. forbidden: gets each operation on
    the GPU and its arguments and says whether to refuse it.
    waits: what made the host wait for the GPU so far: reading values, copies from it, blocking copies to it.
    """

    def __init__(
        self,
        kind: str = "cuda",
        *,
        memory: int = 2**34,
        forbidden: Callable[[Any, Any], bool] = lambda func, args: False,
    ):
        self.device = torch.device(kind, 0)
        self.memory, self.forbidden = memory, forbidden
        self.waits: list[str] = []
        # Whether what an operation makes of no tensor, inside of another one, belongs on the GPU.
        self.inside = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "FakeGpu":
        # `pick_device` sets it.
        self._stack.callback(setattr, torch.backends.cudnn, "deterministic", torch.backends.cudnn.deterministic)
        for where, name, value in _patches(self):
            self._stack.enter_context(patch.object(where, name, value))
        self._stack.enter_context(_Operations(self))
        self._stack.enter_context(_Calls(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def within(self, here: bool) -> Iterator[None]:
        before, self.inside = self.inside, here
        try:
            yield
        finally:
            self.inside = before

    def mark(self, x: Tensor, here: bool) -> None:
        """Say where a tensor's storage lies. Raises: TypeError for float64 on the GPU of an Apple."""
        if here and self.device.type == "mps" and x.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        x.untyped_storage().on_gpu = here

    def is_here(self, device: Any) -> bool:
        """Whether it is this GPU and not the CPU. Raises: RuntimeError for any other."""
        device = torch.device(device)
        if device.type == "cpu":
            return False
        if device.type != self.device.type or device.index not in (None, 0):
            raise RuntimeError(f"invalid device {device}: there is {self.device}")
        return True


class _Calls(TorchFunctionMode):
    """What functions of torch are asked for: devices, generators, copies from one device to the other."""

    def __init__(self, gpu: FakeGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)  # From another mode, such as one that counts: its devices are those of memory.
        here = any(map(on_gpu, _tensors((args, kwargs))))
        if here and func in (Tensor.numpy, Tensor.__array__):
            raise TypeError(f"can't convert {self.gpu.device} device type tensor to numpy. Use Tensor.cpu() first")
        if func is Tensor.pin_memory:
            if here:
                raise RuntimeError("cannot pin 'torch.cuda.ByteTensor' only dense CPU tensors can be pinned")
            return args[0].clone()
        if func in _MOVES:
            return self._move(func, args, kwargs)
        if here and func is Tensor.tolist:
            self.gpu.waits.append("tolist")
        target = self.gpu.is_here(kwargs["device"]) if kwargs.get("device") is not None else None
        gen = kwargs.get("generator")
        if gen is not None and gen.here != (here if target is None else target):
            found = self.gpu.device.type if gen.here else "cpu"
            raise RuntimeError(f"a generator of {found} draws for a tensor of another device ({func.__name__})")
        if target is None:
            with self.gpu.within(here):
                return func(*args, **kwargs)
        kwargs["device"] = "cpu"
        with self.gpu.within(target):
            out = func(*args, **kwargs)
        if target and func in (torch.tensor, *_ALIASES):
            self.gpu.waits.append(func.__name__)
        if func in _ALIASES and on_gpu(out) != target:
            out = out.clone()
        self.gpu.mark(out, target)
        return out

    def _move(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        x, dtype, blocking, memory_format = args[0], None, True, None
        if func is Tensor.cpu:
            target = False
        elif func is Tensor.cuda:
            target = self.gpu.is_here("cuda")
        else:
            known = {name: value for name, value in kwargs.items() if name != "copy"}
            device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args[1:], **known)
            target, blocking = on_gpu(x) if device is None else self.gpu.is_here(device), not non_blocking
        how = {"dtype": dtype or x.dtype, "memory_format": memory_format or torch.preserve_format}
        if target == on_gpu(x):
            return x.to(**how, copy=kwargs.get("copy", False))
        if not target or blocking:
            self.gpu.waits.append(f"copy to {self.gpu.device if target else 'cpu'}")
        return _Moved.apply(x, self.gpu, target, how)


class _Moved(torch.autograd.Function):
    """A copy on the other device, whose gradient goes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gpu: FakeGpu, target: bool, how: dict) -> Tensor:
        ctx.gpu, ctx.back = gpu, (not target, {"dtype": x.dtype})
        with torch._C.DisableTorchFunction():
            out = x.detach().to(**how, copy=True)
            gpu.mark(out, target)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Moved.forward(ctx, grad, ctx.gpu, *ctx.back), None, None, None


class _Operations(TorchDispatchMode):
    """What every operation has to keep to, those of the backward pass included."""

    def __init__(self, gpu: FakeGpu):
        super().__init__()
        self.gpu = gpu

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # Nothing is compiled here, and torch would import its compiler, for seconds.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, op = list(_tensors((args, kwargs))), func.overloadpacket
        with torch._C.DisableTorchFunction():
            here = [x for x in given if on_gpu(x)]
            if here:
                if len(here) < len(given):
                    self._mixed(func, args, [x for x in given if not on_gpu(x)])
                if self.gpu.forbidden(op, args):
                    raise RuntimeError(f"{op} is forbidden here")
                indices = args[1] if op in _INDEXED else []
                masks = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)
                if op in _READS or masks or any(x is not None and not on_gpu(x) for x in indices):
                    self.gpu.waits.append(str(op))
                if op is aten.copy_ and len(here) < len(given) and not (on_gpu(args[0]) and (args[2:] or [False])[0]):
                    self.gpu.waits.append("copy_")
            out = func(*args, **(kwargs or {}))
            if op is not aten.copy_ and (here or (not given and self.gpu.inside)):
                for x in _tensors(out):
                    self.gpu.mark(x, True)
        return out

    def _mixed(self, func: Any, args: Any, others: list[Tensor]) -> None:
        """Raises: RuntimeError unless CUDA takes tensors of both devices for this operation."""
        op, scalars = func.overloadpacket, all(x.ndim == 0 for x in others)
        if op in _INDEXED:
            # Indices may lie in host memory; a value, too, where it is a scalar.
            fine = on_gpu(args[0]) and all(on_gpu(x) or x.ndim == 0 for x in _tensors(args[2:]))
        else:
            changed = func._schema.name.endswith("_") and not on_gpu(next(_tensors(args)))
            fine = scalars and not changed and (torch.Tag.pointwise in func.tags or op in _SCALARS)
        if op is not aten.copy_ and not fine:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {self.gpu.device} and"
                f" cpu! ({func})"
            )


def in_changing_order(op: Any, args: Any) -> bool:
    """Whether two calls of an operation on CUDA may differ, to be forbidden."""
    return op.__name__ in _CHANGING and (op is not aten.cumsum or args[0].is_floating_point())


def on_gpu(x: Tensor) -> bool:
    """Whether a tensor is marked as the GPU's."""
    with torch._C.DisableTorchFunction():
        return getattr(x.untyped_storage(), "on_gpu", False)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _patches(gpu: FakeGpu) -> Iterator[tuple[Any, str, Any]]:
    """What of torch says something else while the fake GPU is there: (where, name, value)."""
    kind = gpu.device.type

    class Generator(_Generator):
        """Draws what one of the CPU draws, for tensors of its device only."""

        def __new__(cls, device: Any = "cpu") -> "Generator":
            return super().__new__(cls, "cpu")

        def __init__(self, device: Any = "cpu"):
            self.here = gpu.is_here(device)

        @property
        def device(self) -> torch.device:
            return gpu.device if self.here else torch.device("cpu")

    class Autocast(_autocast):
        def __init__(self, device_type: str, *args: Any, **settings: Any):
            super().__init__("cpu" if device_type == kind else device_type, *args, **settings)

    def run_backward(outputs: Any, *args: Any, **settings: Any) -> Any:
        # Backward passes written in Python run inside of a call, for which torch takes the mode away.
        with _Calls(gpu), gpu.within(any(map(on_gpu, outputs))):
            return _run_backward(outputs, *args, **settings)

    def parse_to(*args: Any, **settings: Any) -> Any:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        return _parse_to(*args, **settings)

    yield torch._C._nn, "_parse_to", parse_to
    yield torch, "Generator", Generator
    yield torch, "autocast", Autocast
    yield torch.amp, "autocast", Autocast
    yield torch.autograd, "_engine_run_backward", run_backward
    yield Tensor, "device", property(lambda x: gpu.device if on_gpu(x) else torch.device("cpu"))
    yield Tensor, "is_cuda", property(lambda x: kind == "cuda" and on_gpu(x))
    # What torch asks by itself of the device, such as its streams, nobody answers.
    yield torch.accelerator, "current_accelerator", lambda check_available=False: None
    yield torch.accelerator, "is_available", lambda: False
    yield torch.backends.mps, "is_available", lambda: kind == "mps"
    cuda: dict[str, Any] = {
        "is_available": lambda: kind == "cuda",
        "device_count": lambda: int(kind == "cuda"),
        "current_device": lambda: 0,
        "set_device": gpu.is_here,
        "synchronize": lambda device=None: None,
        "get_device_name": lambda device=None: "fake GPU",
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (gpu.memory, gpu.memory),
        "reset_peak_memory_stats": lambda device=None: None,
        "memory_allocated": lambda device=None: 2**20,
        "max_memory_allocated": lambda device=None: 2**21,
    }
    for name, value in cuda.items():
        yield torch.cuda, name, value
