"""What a ``.pte`` says about itself, without running it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from executorch.exir import schema
from executorch.exir.scalar_type import ScalarType

from carpool_export.doctor.products import Product, portable_product, xnnpack_products
from carpool_export.doctor.report import Arena, Delegates, FilePart, PlannedValues
from carpool_export.lowering.private.pte import PteFile, XnnpackGraph, read_xnnpack_graph

XNNPACK = "XnnpackBackend"

DTYPES: dict[ScalarType, torch.dtype] = {
    ScalarType.FLOAT: torch.float32,
    ScalarType.LONG: torch.int64,
    ScalarType.INT: torch.int32,
    ScalarType.SHORT: torch.int16,
    ScalarType.CHAR: torch.int8,
    ScalarType.BYTE: torch.uint8,
    ScalarType.BOOL: torch.bool,
    ScalarType.DOUBLE: torch.float64,
    ScalarType.HALF: torch.float16,
    ScalarType.BFLOAT16: torch.bfloat16,
}

_LARGEST = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticTensor:
    """An input or output as the program has it: its size at the bounds."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    dynamic: bool

    @property
    def bytes(self) -> int:
        """At the bounds."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """Without torch's prefix."""
        return str(self.dtype).removeprefix("torch.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticMethod:
    """A method as the program has it.

    Attributes:
        inputs: None in the place of one that is not a tensor; likewise outputs.
        operators: how often each operator outside of the delegates is called, by its full name.
        products: every matrix product of a call.
    """

    name: str
    inputs: tuple[StaticTensor | None, ...]
    outputs: tuple[StaticTensor | None, ...]
    instructions: int
    delegates: tuple[Delegates, ...]
    operators: Counter[str]
    arena: Arena
    products: tuple[Product, ...]


def methods_of(file: PteFile) -> list[StaticMethod]:
    """Every method, in the program's order."""
    graphs = _Graphs(file)
    return [_method(plan, graphs) for plan in file.program.execution_plan]


def parts_of(file: PteFile) -> list[FilePart]:
    """The file by what it holds; their sizes add up to the file's."""
    program, graphs = file.program, _Graphs(file)
    inline_constants = sum(len(buffer.storage) for buffer in program.constant_buffer)
    inline_delegates = sum(len(data.data) for data in program.backend_delegate_data)
    sizes: Counter[str] = Counter(
        {
            _PROGRAM: file.program_bytes - inline_constants - inline_delegates,
            _CONSTANTS: inline_constants,
            _GRAPHS: inline_delegates,
        }
    )
    named = {data.segment_index for data in program.named_data or []}
    delegated = {
        delegate.processed.index: delegate
        for plan in program.execution_plan
        for delegate in plan.delegates
        if delegate.processed.location == schema.DataLocation.SEGMENT
    }
    constants = set()
    if program.constant_segment is not None and program.constant_segment.offsets:
        constants.add(program.constant_segment.segment_index)
    for index, segment in enumerate(program.segments):
        if index in delegated:
            graph = graphs.of(delegated[index])
            weights = 0 if graph is None else graph.constant_bytes
            sizes[_GRAPHS] += segment.size - weights
            sizes[_DELEGATE_WEIGHTS] += weights
        elif index in named:
            sizes[_NAMED] += segment.size
        elif index in constants:
            sizes[_CONSTANTS] += segment.size
        else:
            sizes["other segments"] += segment.size
    sizes["alignment"] = file.file_bytes - sizes.total()
    frozen = {_NAMED, _CONSTANTS, _DELEGATE_WEIGHTS}
    return [
        FilePart(name=name, bytes=size, frozen=name in frozen)
        for name, size in sizes.most_common()
        if size
    ]


_PROGRAM = "methods (flatbuffer)"
_CONSTANTS = "weights of operators outside of delegates"
_GRAPHS = "delegates' graphs"
_DELEGATE_WEIGHTS = "weights inside of delegates"
_NAMED = "weights that delegates share (named data)"


class _Graphs:
    """XNNPACK's graphs, each read once."""

    def __init__(self, file: PteFile) -> None:
        self._file = file
        self._read: dict[tuple[int, int], XnnpackGraph | None] = {}

    def of(self, delegate: Any) -> XnnpackGraph | None:  # noqa: ANN401  executorch has no types
        """None for another backend's, or where the payload is not as this version writes it."""
        place = (int(delegate.processed.location), delegate.processed.index)
        if delegate.id != XNNPACK:
            return None
        if place not in self._read:
            inline = delegate.processed.location == schema.DataLocation.INLINE
            data = self._file.program.backend_delegate_data
            payload = bytes(data[place[1]].data) if inline else self._file.segment(place[1])
            try:
                self._read[place] = read_xnnpack_graph(payload)
            except ValueError:
                self._read[place] = None
        return self._read[place]


def _method(plan: Any, graphs: _Graphs) -> StaticMethod:  # noqa: ANN401  as above
    values = [value.val for value in plan.values]
    calls = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
    operators: Counter[str] = Counter()
    backends: Counter[str] = Counter()
    products: list[Product] = []
    for call in calls:
        if isinstance(call, schema.KernelCall):
            operator = plan.operators[call.op_index]
            name = f"{operator.name}.{operator.overload}" if operator.overload else operator.name
            operators[name] += 1
            product = portable_product(name, [values[place] for place in call.args])
            products += [] if product is None else [product]
        elif isinstance(call, schema.DelegateCall):
            delegate = plan.delegates[call.delegate_index]
            backends[delegate.id] += 1
            graph = graphs.of(delegate)
            products += [] if graph is None else xnnpack_products(graph)
    return StaticMethod(
        name=plan.name,
        inputs=tuple(_tensor(values[place]) for place in plan.inputs),
        outputs=tuple(_tensor(values[place]) for place in plan.outputs),
        instructions=len(calls),
        delegates=tuple(Delegates(backend=b, calls=n) for b, n in backends.most_common()),
        operators=operators,
        arena=_arena(plan, values, calls),
        products=tuple(products),
    )


def _tensor(value: Any) -> StaticTensor | None:  # noqa: ANN401  as above
    if not isinstance(value, schema.Tensor) or value.scalar_type not in DTYPES:
        return None
    return StaticTensor(
        dtype=DTYPES[value.scalar_type],
        shape=tuple(value.sizes),
        dynamic=value.shape_dynamism != schema.TensorShapeDynamism.STATIC,
    )


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A value's place in the arena and when it is needed: from its first use to its last."""

    tensor: StaticTensor
    memory: int
    start: int
    first: int
    last: int

    @property
    def end(self) -> int:
        return self.start + self.tensor.bytes


def _arena(plan: Any, values: list[Any], calls: list[Any]) -> Arena:  # noqa: ANN401  as above
    uses: dict[int, list[int]] = {}
    for time, call in enumerate(calls):
        for place in _touched(call, values):
            uses.setdefault(place, []).append(time)
    for place in plan.inputs:
        uses.setdefault(place, []).append(0)
    for place in plan.outputs:
        uses.setdefault(place, []).append(len(calls))
    planned = []
    for place, times in uses.items():
        tensor = _tensor(values[place])
        where = None if tensor is None else values[place].allocation_info
        if tensor is not None and where is not None:
            planned.append(
                _Planned(tensor, where.memory_id, where.memory_offset, min(times), max(times))
            )
    most, at = 0, 0
    for time in range(len(calls) + 1):
        used = _covered(value for value in planned if value.first <= time <= value.last)
        most, at = max((most, at), (used, time))
    alive = [value for value in planned if value.first <= at <= value.last]
    distinct = {(value.memory, value.start, value.end): value.tensor for value in alive}
    counts = Counter(
        (tensor.dtype_name, tensor.shape, tensor.bytes) for tensor in distinct.values()
    )
    groups = [
        PlannedValues(count=count, dtype=dtype, shape=shape, bytes=count * size)
        for (dtype, shape, size), count in counts.items()
    ]
    return Arena(
        bytes=sum(plan.non_const_buffer_sizes[1:]),  # the first place stands for constants
        most_in_use_bytes=most,
        largest=tuple(sorted(groups, key=lambda group: -group.bytes)[:_LARGEST]),
    )


def _touched(call: Any, values: list[Any]) -> Iterator[int]:  # noqa: ANN401  as above
    """The values that an instruction reads or writes, those inside of lists too."""
    for place in getattr(call, "args", ()):
        yield place
        if isinstance(values[place], (schema.TensorList, schema.OptionalTensorList)):
            yield from (item for item in values[place].items if item >= 0)
    if isinstance(call, schema.MoveCall):
        yield from (call.move_from, call.move_to)


def _covered(values: Iterable[_Planned]) -> int:
    """Bytes of the arena that the values lie on: a view lies on what it is a view of."""
    total, memory, end = 0, -1, 0
    for value in sorted(values, key=lambda value: (value.memory, value.start)):
        if value.memory != memory:
            memory, end = value.memory, 0
        total += max(0, value.end - max(end, value.start))
        end = max(end, value.end)
    return total
