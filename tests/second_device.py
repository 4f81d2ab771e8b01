"""A second device on a machine without one: CPU tensors that obey the rules of a GPU.

Tests see what would fail on a GPU, and what the host would wait for:

    import second_device
    second_device.install("cuda")  # first in a process of its own; or "mps", or any other name
    with second_device.WaitCounter() as counter:
        model(tokens.to("cuda"))
    print(counter.table())

As on a GPU, a tensor of the device may not meet one of the CPU (other than a single number), a
generator of the CPU, or `.numpy()`; with `WaitCounter(allow_mixed=True)` such a meeting is counted
instead of refused. The host waits for copies to it, for copies from unpinned memory, for `item()`,
and for shapes that depend on numbers. Launches are operations that are no views; attention and
casts of weights count more than a GPU launches.

The tensors are wrappers of torch's Python backend for the device key PrivateUse1. As "cuda" or
"mps" they only say where they are. `torch.cuda` is patched as far as Lightning, transformers and
accelerate ask it, autocast has the lists of operations of torch's own header for CUDA, and "mps"
refuses float64. Not shown: rounding, streams, memory, speed, several devices.
"""

from __future__ import annotations

import ctypes
import re
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
CORE_NAME = "second"  # the device's name in torch's core
device_name = "cuda"  # its name in Python, set by `install`
# Number and dispatch key of the devices that torch's core has a name for.
CORE_DEVICES = {"cuda": (1, "CUDA"), "mps": (13, "MPS")}
# Size of torch's table of device guards, and the number of PrivateUse1 in it.
NUM_DEVICE_TYPES, PRIVATE_NUMBER = 21, 20
# Operations whose indices may be on the CPU.
INDEX_OPERATIONS = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
# Operations that accept a single number of the CPU though they are not pointwise.
FILL_OPERATIONS = ("fill_", "masked_fill", "masked_fill_")
WAIT_KINDS = {torch.Tag.dynamic_output_shape: "shape", torch.Tag.data_dependent_output: "item"}
FACTORIES = (
    "empty.memory_format empty_strided arange arange.start arange.start_step eye eye.m linspace "
    "randperm randperm.generator"
)
COPY_OPTIONS = ("dtype", "layout", "memory_format")
AUTOCAST_LISTS = re.compile(
    r"#define AT_FORALL_(LOWER_PRECISION_FP|FP32|FP32_SET_OPT_DTYPE|PROMOTE)\(_\)(.*?)\n\n",
    re.DOTALL,
)
_registrations: list[Any] = []  # libraries and guards have to stay alive
_device_generators: set[int] = set()  # addresses of the generators of the device
_counter: WaitCounter | None = None


class WaitCounter:
    """Count waits and launches inside a `with` block.

    Args:
        package: folder name of the package whose lines are reported, and below them the innermost
            line outside torch.
        allow_mixed: count a meeting of device and CPU tensors as `mixed` instead of raising.

    Attributes:
        events: waits by kind, operation and line.
        launches: launches by operation.
    """

    def __init__(self, package: str = "dmt", allow_mixed: bool = False) -> None:
        self.package, self.allow_mixed = package, allow_mixed
        self.events: Counter[tuple[str, str, str]] = Counter()
        self.launches: Counter[str] = Counter()

    def __enter__(self) -> WaitCounter:
        global _counter
        self._outer, _counter = _counter, self
        return self

    def __exit__(self, *_: object) -> None:
        global _counter
        _counter = self._outer

    @property
    def waits(self) -> int:
        """Number of waits."""
        return self.events.total()

    def table(self, repeats: int = 1) -> str:
        """Return the counts as text, divided by the number of repeats."""
        lines = [
            f"{self.waits / repeats:8.2f} waits, {self.launches.total() / repeats:.1f} launches"
        ]
        lines += [
            f"{count / repeats:8.2f} {kind:<9} {line:<60} {operation}"
            for (kind, operation, line), count in self.events.most_common()
        ]
        return "\n".join(lines)

    def add_launch(self, operation: Any) -> None:
        """Count an operation unless it is a view."""
        returns = operation._schema.returns
        if not any(value.alias_info and not value.alias_info.is_write for value in returns):
            self.launches[str(operation)] += 1

    def add_wait(self, kind: str, operation: Any) -> None:
        """Count a wait of the calling line."""
        frame, library_line, line = sys._getframe(2), "", ""
        while frame is not None and not line:
            file = frame.f_code.co_filename
            if f"/{self.package}/" in file:
                line = f"{file.rpartition(f'/{self.package}/')[2]}:{frame.f_lineno}"
            elif not library_line and "/torch/" not in file and file != __file__:
                library_line = f" <- {'/'.join(file.split('/')[-2:])}:{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        self.events[kind, str(operation).removeprefix("aten."), line + library_line] += 1


def _note_wait(kind: str, operation: Any) -> None:
    if _counter is not None:
        _counter.add_wait(kind, operation)


def _note_launch(operation: Any) -> None:
    if _counter is not None:
        _counter.add_launch(operation)


def _is_device(device: Any) -> bool:
    return device is not None and torch.device(device).type in (CORE_NAME, device_name)


def _unwrap(value: Any) -> Any:
    return value.raw if isinstance(value, DeviceTensor) else value


def _dispatch_key(prefix: str = "") -> Any:
    suffix = CORE_DEVICES[device_name][1] if device_name in CORE_DEVICES else "PrivateUse1"
    return getattr(torch._C.DispatchKey, prefix + suffix)


class DeviceTensor(torch.Tensor):
    """A tensor of the device.

    Attributes:
        raw: the CPU tensor with its numbers.
    """

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, data: Any, requires_grad: bool = False) -> Any:
        """Create a parameter, as accelerate does with the class of a parameter."""
        return torch.nn.Parameter(data, requires_grad)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device that the tensor says it is on."""
        return torch.device(device_name, 0)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """Whether the device is called "cuda"."""
        return device_name == "cuda"

    def data_ptr(self) -> int:
        """Return the address of the numbers."""
        return self.raw.data_ptr()

    def untyped_storage(self) -> Any:
        """Return the storage of the numbers."""
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        """Copy the numbers to the host."""
        _note_wait("to host", "tolist")
        return self.raw.tolist()

    def numpy(self, **_: Any) -> Any:
        """Refuse, as torch does for every tensor that is not on the CPU."""
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy it "
            "to the host first"
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.raw!r}, device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a tensor of the CPU."""
        _note_wait("to host", "pickle")
        return self.raw.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        memo[id(self)] = copy
        vars(copy).update({name: value for name, value in vars(self).items() if name != "raw"})
        return copy

    @staticmethod
    def wrap(raw: torch.Tensor) -> Any:
        """Wrap a CPU tensor."""
        if device_name == "mps" and raw.dtype in (torch.float64, torch.complex128):
            raise TypeError(
                f"Cannot convert a MPS Tensor to {raw.dtype} dtype as the MPS framework doesn't "
                "support it"
            )
        tensor: Any = torch.Tensor._make_wrapper_subclass(
            DeviceTensor,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(CORE_NAME, 0),
            storage_size=raw.untyped_storage().nbytes(),
            _extra_dispatch_keys=torch._C.DispatchKeySet(_dispatch_key("Autocast")),
        )
        tensor.raw = raw.detach()
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.is_inference_mode_enabled():
            return cls._run(func, args, kwargs or {})
        # In inference mode composite operations arrive whole. Tensors that are made inside it are
        # ordinary ones here.
        result = func.decompose(*args, **(kwargs or {}))
        with torch.inference_mode(False):
            return cls._run(func, args, kwargs or {}) if result is NotImplemented else result

    @classmethod
    def _run(cls, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation with at least one tensor of the device."""
        if func in (aten._to_copy.default, aten.copy_.default):
            return cls._copy(func, args, kwargs)
        if torch.Tag.inplace_view in func.tags and "resize" not in func._schema.name:
            func(args[0].raw, *args[1:], **kwargs)
            with torch._C._DisableTorchDispatch():  # the wrapper has to change its shape too
                return func(*args, **kwargs)
        leaves, device = pytree.tree_leaves((args, kwargs)), kwargs.get("device")
        cls._check(func, args, leaves)
        wrappers = {id(leaf.raw): leaf for leaf in leaves if isinstance(leaf, DeviceTensor)}
        raw_kwargs = kwargs | ({} if device is None else {"device": "cpu"})
        result = func(*pytree.tree_map(_unwrap, args), **pytree.tree_map(_unwrap, raw_kwargs))

        def rewrap(value: Any) -> Any:
            wrapper = wrappers.get(id(value), value)
            if wrapper is value:
                return cls.wrap(value) if isinstance(value, torch.Tensor) else value
            if (wrapper.shape, wrapper.stride()) != (value.shape, value.stride()):
                raise NotImplementedError(f"{func} changes the size of a tensor in place")
            return wrapper

        if device is not None and not _is_device(device):
            return result
        return pytree.tree_map(rewrap, result)

    @classmethod
    def _copy(cls, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        _note_launch(func)
        if func is aten._to_copy.default:
            options = {name: kwargs[name] for name in kwargs if name in COPY_OPTIONS}
            result = func(args[0].raw, **options)
            if kwargs.get("device") is None or _is_device(kwargs["device"]):
                return cls.wrap(result)
            _note_wait("to host", func)
            return result.to(kwargs["device"])  # may be `meta`
        target, source = args[:2]
        to_device = isinstance(target, DeviceTensor)
        is_asynchronous = to_device and args[2:] == (True,) and hasattr(source, "pinned")
        if to_device != isinstance(source, DeviceTensor) and source.numel() and not is_asynchronous:
            _note_wait("to device" if to_device else "to host", func)
        _unwrap(target).copy_(_unwrap(source).detach())
        return target

    @classmethod
    def _check(cls, func: Any, args: Any, leaves: list[Any]) -> None:
        """Raise where CUDA would; count waits and launches."""
        name = func._schema.name.removeprefix("aten::")
        cpu_tensors = [
            leaf
            for leaf in leaves
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DeviceTensor)
        ]
        if name in INDEX_OPERATIONS:
            indices = [index for index in args[1] if index is not None]
            cpu_tensors = [
                tensor for tensor in cpu_tensors if all(tensor is not index for index in indices)
            ]
            if isinstance(args[0], DeviceTensor) and not all(
                isinstance(index, DeviceTensor) for index in indices
            ):
                _note_wait("to device", func)
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                _note_wait("shape", func)
        elif kinds := [kind for tag, kind in WAIT_KINDS.items() if tag in func.tags]:
            _note_wait(kinds[0], func)
        takes_number = torch.Tag.pointwise in func.tags or name in (
            *INDEX_OPERATIONS,
            *FILL_OPERATIONS,
        )
        for tensor in cpu_tensors:
            is_target = name.endswith("_") and tensor is args[0]
            if tensor.dim() or not takes_number or is_target:
                _refuse_mixed(func, tensor)
        for leaf in leaves:
            if isinstance(leaf, torch._C.Generator) and leaf._cdata not in _device_generators:  # type: ignore[attr-defined]
                raise RuntimeError(
                    f"Expected a '{device_name}' device type for generator but found 'cpu' "
                    f"(in {func})"
                )
        _note_launch(func)


def _refuse_mixed(func: Any, tensor: torch.Tensor) -> None:
    _note_wait("mixed", func)
    if _counter is None or not _counter.allow_mixed:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{device_name}:0 and cpu! ({func}, of the CPU {tuple(tensor.shape)})"
        )


class Generator(torch.Generator):
    """A generator of the CPU or of the device, which draws the same numbers."""

    def __init__(self, device: Any = "cpu") -> None:
        pass

    def __new__(cls, device: Any = "cpu") -> Any:
        generator: Any = super().__new__(cls)
        if _is_device(device):
            _device_generators.add(generator._cdata)
        else:  # the address may have belonged to another one
            _device_generators.discard(generator._cdata)
        return generator

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it draws."""
        is_ours = self._cdata in _device_generators  # type: ignore[attr-defined]
        return torch.device(device_name, 0) if is_ours else torch.device("cpu")


def install(name: str = "cuda") -> None:
    """Add a device to torch, once in a process, before anything asks torch for devices.

    Args:
        name: of the device: `cuda`, `mps`, or any other.
    """
    global device_name
    device_name = name
    answers: dict[str, Any] = {"get_rng_state": lambda *_: torch.get_rng_state()}
    for value, names in (
        (True, "is_available is_initialized is_bf16_supported"),
        (False, "_is_in_bad_fork"),
        (None, "_lazy_init set_device empty_cache synchronize manual_seed manual_seed_all"),
        (None, "set_rng_state"),
        (0, "current_device memory_allocated memory_reserved"),
        (1, "device_count"),
        (CORE_NAME, "get_device_name"),
        ([torch.bfloat16, torch.float16], "get_amp_supported_dtype"),
    ):
        answers |= {function_name: _make_answer(value) for function_name in names.split()}
    if name in CORE_DEVICES:
        _install_guard(name)
    backend = types.ModuleType(CORE_NAME)
    vars(backend).update(answers)
    _setup_privateuseone_for_python_backend(CORE_NAME, backend)
    # A parameter stays the object it is when it is moved, so tied parameters stay tied.
    torch.__future__.set_swap_module_params_on_conversion(True)
    # Optimizers update all parameters at once, as they do on a GPU.
    torch.utils._foreach_utils._foreach_supported_types.append(DeviceTensor)
    torch.Generator = Generator  # type: ignore[misc]
    if name == "cuda":
        torch.Tensor.pin_memory = _pin_memory  # type: ignore[method-assign]
        properties = types.SimpleNamespace(
            name=CORE_NAME,
            major=9,
            minor=0,
            total_memory=2**37,
            multi_processor_count=132,
            warp_size=32,
        )
        vars(torch.cuda).update(
            answers
            | {
                "get_device_properties": _make_answer(properties),
                "get_device_capability": _make_answer((9, 0)),
                "mem_get_info": _make_answer((2**36, 2**37)),
            }
        )
    elif name == "mps":
        vars(torch.backends.mps).update(
            {function_name: _make_answer(True) for function_name in ("is_available", "is_built")}
        )
        vars(torch.mps).update(
            {
                function_name: _make_answer(None)
                for function_name in ("manual_seed", "empty_cache", "synchronize")
            }
        )
    _register_operations(torch.library.Library("aten", "IMPL"))


def _make_answer(value: Any) -> Any:
    return lambda *_, **__: value


def _pin_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy from which the device copies while the host goes on."""
    copy = tensor.clone()
    copy.pinned = True  # type: ignore[attr-defined]
    return copy


def _install_guard(name: str) -> None:
    """Give torch's core a guard for a device that a CPU build has none for.

    `Tensor.to("cuda")` looks one up. Python can make one for PrivateUse1 alone, so that is copied
    to the device's entry of the core's table.
    """
    number, key = CORE_DEVICES[name]
    device_type = getattr(torch._C._autograd.DeviceType, key)
    guard_class = type("Guard", (torch._C._acc.DeviceGuard,), {"type_": lambda self: device_type})
    guard = guard_class()
    _registrations.append(guard)
    symbol = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * NUM_DEVICE_TYPES).in_dll(ctypes.CDLL(torch._C.__file__), symbol)
    torch._C._acc.register_python_privateuseone_device_guard(guard)
    guards[number], guards[PRIVATE_NUMBER] = guards[PRIVATE_NUMBER], None


def _register_operations(library: Any) -> None:
    """Register factories, copies that bypass wrappers, and CUDA's autocast."""
    fallbacks = torch.library.Library("_", "IMPL")
    _registrations.extend([library, fallbacks])
    fallbacks.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for full_name in FACTORIES.split():
        name, _, overload = full_name.partition(".")
        operation = getattr(getattr(aten, name), overload or "default")
        for key in {"PrivateUse1", _dispatch_key().name}:
            library.impl(full_name, _make_factory(operation), key)

    def copy_from(source: Any, target: Any, _: bool = False) -> Any:
        return DeviceTensor._copy(aten.copy_.default, (target, source), {})

    library.impl("_copy_from", copy_from, "PrivateUse1")
    header = (Path(torch.__path__[0]) / "include/ATen/autocast_mode.h").read_text()
    for policy, body in AUTOCAST_LISTS.findall(header):
        for name, overload in re.findall(r"_\((\w+)(?:, (\w+))?\)", body):
            operation = getattr(getattr(aten, name), overload or "default", None)
            if operation is not None:
                library.impl(
                    f"{name}.{overload}".rstrip("."),
                    _make_autocast(operation, policy),
                    _dispatch_key("Autocast").name,
                    allow_override=True,
                )


def _make_factory(operation: Any) -> Any:
    def create(*args: Any, **kwargs: Any) -> Any:
        DeviceTensor._check(operation, args, [*args, *kwargs.values()])
        options = {name: kwargs[name] for name in kwargs if name in COPY_OPTIONS}
        return DeviceTensor.wrap(operation(*args, **options))

    return create


def _make_autocast(operation: Any, policy: str) -> Any:
    """Make an operation cast its arguments by the policy that CUDA's autocast has for it."""

    def takes_cast(value: Any) -> bool:
        return (
            isinstance(value, DeviceTensor)
            and value.is_floating_point()
            and value.dtype != torch.float64
        )

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        has_float32 = any(
            leaf.dtype == torch.float32 for leaf in leaves if isinstance(leaf, DeviceTensor)
        )
        use_half = policy == "LOWER_PRECISION_FP" or (policy == "PROMOTE" and not has_float32)
        dtype = torch.get_autocast_dtype(device_name) if use_half else torch.float32
        autocast_key = torch._C.DispatchKeySet(_dispatch_key("Autocast"))
        with torch._C._ExcludeDispatchKeyGuard(autocast_key):
            if policy == "FP32_SET_OPT_DTYPE":
                names = [argument.name for argument in operation._schema.arguments]
                named = dict(zip(names, args, strict=False)) | kwargs
                if takes_cast(args[0]):
                    named["dtype"] = named.get("dtype") or dtype
                return operation(**named)

            def cast(value: Any) -> Any:
                return value.to(dtype) if takes_cast(value) else value

            return operation(*pytree.tree_map(cast, args), **pytree.tree_map(cast, kwargs))

    return run
