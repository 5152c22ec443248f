"""Pickles read as data: the tensors, tables, lists, texts and numbers in one, without running any of it.

A pickle is a program for a small machine with a stack; `pickletools` of the standard library takes it apart. The
machine here knows the operations that `torch.save` writes, in all protocols since 2, and calls nothing that a pickle
names: what rebuilds a tensor gives the tensor's place in the file, `collections.OrderedDict` gives a table, and any
other object stays a `Foreign`, of which nothing but its name is known.
"""

import pickletools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch

from detune.errors import InputError

__all__ = ["Foreign", "PickledStorage", "StoredTensor", "read_pickle"]

# Some 30 operations make a tensor: this is a model of 100,000 tensors, and some seconds of reading.
MAX_OPERATIONS = 3_000_000
# The name of a class or function, with its module.
MAX_GLOBAL_LENGTH = 1000
# Below this an integer is its own hash; larger ones can be chosen so that they all collide.
MAX_KEY = 2**60


@dataclass(frozen=True)
class PickledStorage:
    """A run of numbers that the file holds under a key.

    Attributes:
        key: The key.
        dtype: Their dtype; uint8 for bytes of whatever dtype the tensor says; None where torch has a type of its own.
        size: How many there are.
    """

    key: str
    dtype: torch.dtype | None
    size: int

    @property
    def nbytes(self) -> int:
        """Their size; at least, where torch has a type of its own."""
        return self.size * (1 if self.dtype is None else self.dtype.itemsize)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the pickle describes it; none of the numbers have been checked.

    Attributes:
        storage: Where its elements are.
        dtype: Their dtype.
        offset: The first one, in elements of that dtype.
        shape: Its shape.
        stride: Its strides in elements.
        lazy: Whether its values are the negatives or conjugates of what is stored.
    """

    storage: PickledStorage
    dtype: torch.dtype | None
    offset: int
    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    lazy: bool


@dataclass(frozen=True, eq=False)
class Foreign:
    """An object that was not made.

    Attributes:
        what: The class or function that would have made it, or its type.
    """

    what: str


@dataclass(frozen=True)
class _Global:
    """A class or function by its dotted name."""

    name: str


def read_pickle(stream: IO[bytes]) -> Any:
    """Read one pickle.

    Args:
        stream: At its first byte; afterwards behind its last. A length that the pickle states is asked of it in one
            go: it must end where the pickle's part of the file does.

    Returns:
        Tables (keys are texts, numbers, None or `Foreign`), lists, tuples, texts, bytes, numbers, None, `StoredTensor`,
        `PickledStorage` and `Foreign`. Lists and tables may contain themselves.

    Raises:
        InputError: It has more than `MAX_OPERATIONS` operations.
        Exception: It is damaged; of whatever kind the fault makes it.
    """
    machine = _Machine()
    for operation, argument, _ in pickletools.genops(stream):
        machine.spend(1)
        _OPERATIONS[operation.name](machine, argument)
    return machine.result


class _Machine:
    """The stack, the memory and the marks of the machine that pickles are written for."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memory: dict[int, Any] = {}
        self.result: Any = None
        self._spent = 0

    def spend(self, operations: int) -> None:
        self._spent += operations
        if self._spent > MAX_OPERATIONS:
            raise InputError(
                "a pickle is too long", f"expected at most {MAX_OPERATIONS} operations", "save it as safetensors"
            )

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("an operation takes what lies below a mark")
        return self.stack.pop()

    def pop_many(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self.pop() for _ in range(count)]))

    def pop_to_mark(self) -> list[Any]:
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def stop(self) -> None:
        self.result = self.pop()

    def put(self, place: int) -> None:
        self.memory[place] = self.stack[-1]

    def append(self, values: Iterable[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)

    def set_items(self, values: list[Any] | tuple[Any, ...]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(_table(zip(values[::2], values[1::2], strict=True)))

    def push_global(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str) and len(module) + len(name) < MAX_GLOBAL_LENGTH):
            raise ValueError("a class or function without a name")
        self.push(_Global(f"{module}.{name}"))

    def push_object(self, arguments: Any) -> None:
        made_by = self.pop()
        # A list that is named twice is one list, and may be copied as often.
        self.spend(sum(len(argument) for argument in arguments if isinstance(argument, list)))
        self.push(_called(made_by.name if isinstance(made_by, _Global) else "", arguments))

    def push_foreign(self, made_by: Any, *_: Any) -> None:
        self.push(Foreign(_kind(made_by)))


_LITERALS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE"),
    *("SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)

_OPERATIONS: Mapping[str, Callable[[_Machine, Any], object]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "STOP": lambda machine, _: machine.stop(),
    **dict.fromkeys(_LITERALS, _Machine.push),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push(Foreign("set")),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.push(machine.pop_many(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.pop_many(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.pop_many(3)),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "LIST": lambda machine, _: machine.push(machine.pop_to_mark()),
    "FROZENSET": lambda machine, _: machine.push_foreign(frozenset(), machine.pop_to_mark()),
    "APPEND": lambda machine, _: machine.append(machine.pop_many(1)),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "ADDITEMS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop_many(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "POP": lambda machine, _: machine.pop(),
    "POP_MARK": lambda machine, _: machine.pop_to_mark(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memory)),
    "BINGET": lambda machine, place: machine.push(machine.memory[place]),
    "LONG_BINGET": lambda machine, place: machine.push(machine.memory[place]),
    "GLOBAL": lambda machine, names: machine.push_global(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.push_global(*machine.pop_many(2)),
    "REDUCE": lambda machine, _: machine.push_object(machine.pop()),
    "NEWOBJ": lambda machine, _: machine.push_object(machine.pop()),
    "NEWOBJ_EX": lambda machine, _: machine.push_foreign(*machine.pop_many(3)),
    "BUILD": lambda machine, _: machine.pop(),  # attributes of an object: nothing here has any
    "BINPERSID": lambda machine, _: machine.push(_storage(machine.pop())),
}

_STORAGE_DTYPES: Mapping[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ComplexFloatStorage": torch.complex64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


def _storage(place: Any) -> PickledStorage:
    match place:
        case ("storage", _Global() as kind, str(key), _, int(size), *views) if not any(views):
            return PickledStorage(key, _STORAGE_DTYPES.get(kind.name.rpartition(".")[2]), size)
    raise ValueError("a reference to something other than a storage")


def _called(function: str, arguments: Any) -> Any:
    """Give the data that a call stands for, or a `Foreign`."""
    match function, arguments:
        case (
            "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2",
            (PickledStorage() as storage, int(offset), tuple(shape), tuple(stride), *more),
        ):
            # Behind these stand requires_grad, hooks, and what makes a view lazy.
            return StoredTensor(storage, storage.dtype, offset, shape, stride, lazy=any(more[2:]))
        case (
            "torch._utils._rebuild_tensor_v3",
            (PickledStorage() as storage, int(offset), tuple(shape), tuple(stride), _, _, _Global() as dtype, *more),
        ):
            return StoredTensor(storage, _dtype(dtype.name), offset, shape, stride, lazy=any(more))
        case (
            "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state",
            (StoredTensor() as tensor, *_),
        ):
            return tensor
        case (
            "torch._tensor._rebuild_from_type_v2",
            (
                _Global() as rebuild,
                _Global("torch.Tensor" | "torch._tensor.Tensor" | "torch.nn.parameter.Parameter"),
                inner,
                _,
            ),
        ):
            return _called(rebuild.name, inner)
        case "collections.OrderedDict", ():
            return {}
        case "collections.OrderedDict", (list() as pairs,):
            return _table((key, value) for key, value in pairs)
        case "torch.Size", (tuple() as sizes,):
            return sizes
    return Foreign(function)


def _dtype(name: str) -> torch.dtype | None:
    module, _, attribute = name.rpartition(".")
    found = getattr(torch, attribute, None) if module == "torch" else None
    return found if isinstance(found, torch.dtype) else None


def _table(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    return {_key(key): value for key, value in pairs}


def _key(value: Any) -> Any:
    """A key that is quickly hashed: tuples of tuples can take for ever."""
    quick = value is None or isinstance(value, str | bytes) or (isinstance(value, int) and abs(value) < MAX_KEY)
    return value if quick else Foreign(_kind(value))


def _kind(value: Any) -> str:
    match value:
        case Foreign(what):
            return what
        case _Global(name):
            return name
    return type(value).__name__
