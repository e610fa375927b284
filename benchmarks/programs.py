"""What the compilers for a TPU and a GPU make of the library's functions, beside Optax's or else the plain formula.

    pip install '.[programs]'                    # the compilers: neither TPU nor GPU nor CUDA has to be here
    python benchmarks/programs.py tpu            # all of the table, in some minutes; or gpu; or one chip, such as b200
    python benchmarks/programs.py tpu --only 'integer labels' entropy

Programs are compiled, by XLA's own compilers, for a TPU v5e and for an H100, and counted; nothing is run. A row says of
the library's program and of its peer's:

GB            what all kernels read and write in the device's memory, those in a loop as often as it turns. Of an array
              that is sliced, gathered from or updated in place only that part counts, and nothing that a TPU keeps on
              the chip. A scatter counts as reading and writing all of its array, in which a GPU changes a few numbers.
kernels       how many are started.
conditionals  how many branches on data there are: a GPU makes the host wait for each, a TPU keeps the memory of both.
MB            XLA's figure for temporary memory.
megacycles    the sum of the TPU compiler's own estimates, in which nothing overlaps.
seconds       to trace and compile, with all caches empty.

A loop whose turns depend on the data, of which the compiler knows no number, counts in none of these but the last two. What
a turn of it costs is said after the table.

Bytes and structure are facts, cycles an estimate, and no time was measured but that of the compiler. The peer is Optax'
function where it has one, in its own precision, and else the obvious formula in float32.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the plugins have no devices to offer

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.scipy.special import entr, rel_entr, xlogy
from jax.sharding import Sharding, SingleDeviceSharding

import jaxce


class Gpu(NamedTuple):
    """What XLA's model of a GPU has to know; the figures are those that XLA publishes for the device."""

    name: str
    capability: int
    cores: int
    units: int  # for floating-point numbers in a core
    gigahertz: float
    bandwidth: int  # bytes a second
    memory: int
    cache: int  # the second level
    shared: int  # memory of a core
    shared_by_block: int

    @property
    def target(self) -> str:
        """The text that XLA's compiler reads."""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  core_count: {self.cores}  fpus_per_core: {self.units}  clock_rate_ghz: {self.gigahertz}
  shared_memory_per_block: 49152  shared_memory_per_core: {self.shared}
  shared_memory_per_block_optin: {self.shared_by_block}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}  l2_cache_size: {self.cache}  device_memory_size: {self.memory}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {self.capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.name}"
"""


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 3352320000000, 84942979072, 52428800, 233472, 232448),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 2039040000000, 85100068864, 41943040, 167936, 166912),
    "b200": Gpu("NVIDIA B200", 10, 148, 128, 1.965, 7672320000000, 191514411008, 132644864, 233472, 232448),
}
TPUS = {"v5e": "v5e:2x2", "v4": "v4:2x2x1", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""The smallest topologies of each."""

TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What libtpu wants to be told where there is no TPU to ask, and other processes that use it."""


# ------------------------------------------------------------------------------------------------------------ compiling


def devices(kind: str, topology: str | None = None) -> list[Any]:
    """The devices of a topology: of a "tpu", a v5e, or another of `TPUS`; of a "gpu", an H100, or another of `GPUS`."""
    if kind in TPUS or kind == "tpu":
        for name, value in TPU.items():
            os.environ.setdefault(name, value)
        topology = topology or TPUS.get(kind, TPUS["v5e"])
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    gpu = GPUS.get(kind, GPUS["h100"])
    options = {"target_config": gpu.target, "topology": topology or "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", topology_name=gpu.name, **options).devices


def array(place: Any, shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    """An array that isn't there either; ``place`` is a device or a sharding."""
    sharding = place if isinstance(place, Sharding) else SingleDeviceSharding(place)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)


class Turn(NamedTuple):
    """A turn of a loop that turns as often as the data says."""

    gigabytes: float
    megacycles: float


class Report(NamedTuple):
    """What is known of a compiled program; the module's docstring says what the figures mean."""

    gigabytes: float
    kernels: int
    conditionals: int
    temporary_mb: float
    megacycles: float
    seconds: float
    turns: list[Turn]
    collectives: list[Collective]
    text: str


def report(function: Callable[..., Any], *args: Any) -> Report:
    """What becomes of a function of such arrays."""
    jax.clear_caches()
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    program = _parse(text)

    def cost(name: str) -> Turn:
        ran = list(_run(program, name, unknown=0))
        traffic = sum(times * _traffic(program, i) for i, times in ran if not _is_free(i))
        return Turn(traffic / 1e9, sum(times * _cycles(i) for i, times in ran) / 1e6)

    ran = list(_run(program, program.entry))
    unknown = [i for i, _ in ran if i.op == "while" and _turns(program, i) is None]
    whole = cost(program.entry)
    return Report(
        gigabytes=whole.gigabytes,
        kernels=sum(times for i, times in _run(program, program.entry, unknown=0) if not _is_free(i)),
        conditionals=sum(times for i, times in ran if i.op == "conditional"),
        temporary_mb=memory.temp_size_in_bytes / 1e6,
        megacycles=whole.megacycles,
        seconds=seconds,
        turns=[cost(name) for i in unknown for name in _BODY.findall(i.attributes)],
        collectives=collectives(text),
        text=text,
    )


# ---------------------------------------------------------------------------------------------- reading what came of it


class Instruction(NamedTuple):
    """A line of a program's text."""

    name: str
    result: str  # its type
    op: str
    inside: str  # of the parentheses
    attributes: str
    operands: list[str]  # names; what is only another view of an array has that one's
    types: list[str]  # of these


class Program(NamedTuple):
    """A program's text by its computations; the last instruction of each is its result."""

    computations: dict[str, list[Instruction]]
    entry: str


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:, (.*))?$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")

_CONTROL = {"while", "conditional", "call", "async-start"}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all", "partition-id"}
_FREE |= {"replica-id", "opt-barrier", "add-dependency"} | _CONTROL
_SLICES = {"slice", "dynamic-slice", "gather"}


def _parse(text: str) -> Program:
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    entry, types, views = "", {}, {}
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if head := _HEAD.match(line):
            current = computations[head[2]] = []
            entry, types, views = head[2] if head[1] else entry, {}, {}
        elif found := _LINE.match(line):
            name, result, op, inside, attributes = found.groups("")
            operands = [views.get(o, o) for o in re.findall(r"%([\w.\-]+)", inside)]
            i = Instruction(name, result, op, inside, attributes, operands, [types[o] for o in operands])
            if op == "fusion" and {j.op for j in computations[_called(i)[0]]} == {"parameter", "bitcast"}:
                i = i._replace(op="bitcast")
            if i.op == "bitcast":
                views[name] = operands[0]
            types[name] = result
            current.append(i)
    return Program(computations, entry)


def _arrays(types: str) -> Iterator[tuple[int, tuple[int, ...], bool]]:
    """Bytes, shape, and whether it is in the device's memory, of the arrays of a type."""
    for dtype, sizes, layout in _ARRAY.findall(types):
        shape = tuple(map(int, filter(None, sizes.split(","))))
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        yield math.prod(shape) * bits // 8, shape, "S(" not in layout


def _bytes(types: str, anywhere: bool = False) -> int:
    return sum(size for size, _, here in _arrays(types) if here or anywhere)


def _called(i: Instruction) -> list[str]:
    branches = _BRANCHES.search(i.attributes)
    return _CALLED.findall(i.attributes) + (branches[1].replace("%", "").split(", ") if branches else [])


def _turns(program: Program, loop: Instruction) -> int | None:
    """How often a loop turns: what the compiler says, or else the number that its condition compares with, if it does."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    found = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    condition = _run(program, found[1], inside=True) if found else ()
    numbers = [int(i.inside) for i, _ in condition if i.op == "constant" and i.inside.isdigit()]
    return max(numbers, default=None)


def _run(
    program: Program, name: str, times: int = 1, inside: bool = False, unknown: int = 1
) -> Iterator[tuple[Instruction, int]]:
    """All instructions that run when a computation does, and how often; of a conditional both branches.

    Those that a kernel or a reduction is made of only if ``inside``. A loop of which nobody knows turns ``unknown`` times.
    """
    for i in program.computations[name]:
        yield i, times
        if inside or i.op in _CONTROL:
            turns = _turns(program, i) if i.op == "while" else 1
            for called in _called(i):
                yield from _run(program, called, times * (unknown if turns is None else turns), inside, unknown)


def _is_free(i: Instruction) -> bool:
    """Whether it is no kernel: the end of one that was started before, or nothing that is done."""
    return i.op in _FREE or i.op.endswith(("-done", "-update")) or '"AllocateBuffer"' in i.attributes


def _cycles(i: Instruction) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
    return int(found[1]) if found else 0


def _traffic(program: Program, kernel: Instruction) -> int:
    return sum(_read(program, kernel, n) for n in range(len(kernel.operands))) + _written(program, kernel)


def _read(program: Program, i: Instruction, n: int) -> int:
    """The bytes that an instruction reads of an operand."""
    size = _bytes(i.types[n])
    op = i.op.removesuffix("-start")
    if n == 0 and op == "dynamic-update-slice":
        return 0
    if n == 0 and op in _SLICES:
        return min(size, _bytes(i.result, anywhere=True))
    if op != "fusion":
        return size
    body = program.computations[_called(i)[0]]
    parameter = next(j.name for j in body if j.op == "parameter" and j.inside == str(n))
    users = ((j, m) for j in body for m, name in enumerate(j.operands) if name == parameter and j.op != "bitcast")
    return min(size, sum(_read(program, j, m) for j, m in users))


def _written(program: Program, i: Instruction) -> int:
    """The bytes that an instruction writes."""
    if i.op.endswith("-start") and i.op != "all-reduce-start":  # the operands are in the result, too
        return _bytes(i.result) - sum(map(_bytes, i.types))
    sizes = [size if here else 0 for size, _, here in _arrays(i.result)]
    outputs = _outputs(program, i)
    if len(outputs) != len(sizes):
        return sum(sizes)
    updates = [_bytes(o.types[1], anywhere=True) if o.op == "dynamic-update-slice" else math.inf for o in outputs]
    return sum(int(min(pair)) for pair in zip(sizes, updates, strict=True))


def _outputs(program: Program, i: Instruction) -> list[Instruction]:
    """The instructions that make the results of a kernel."""
    if i.op != "fusion":
        return [i]
    body = {j.name: j for j in program.computations[_called(i)[0]]}
    last = list(body.values())[-1]
    return [body[o] for o in last.operands] if last.op in ("tuple", "bitcast") else [last]


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    times: int  # how often it runs


_KINDS = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"}
_KINDS |= {"collective-broadcast"}


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program's text, those of a loop's body with the number of its turns."""
    program = _parse(text)
    found = []
    for i, times in _run(program, program.entry, inside=True):
        kind = i.op.removesuffix("-start")
        if kind in _KINDS:
            results = list(_arrays(i.result))
            if i.op != kind and kind != "all-reduce":  # the operands come first
                results = results[len(i.operands) :]
            found.append(Collective(kind, tuple(s for _, s, _ in results), sum(n for n, _, _ in results), times))
    return found


# ------------------------------------------------------------------------------------------------- what is put together


Loss = Callable[..., Any]
Shape = tuple[int, ...]
Struct = tuple[Shape, str]


def with_integers(shape: Shape, dtype: str) -> list[Struct]:
    """Logits, and a class for each row."""
    return [(shape, dtype), (shape[:1], "int32")]


def of_images(shape: Shape, dtype: str) -> list[Struct]:
    """Logits of pixels, [images, classes, height, width], and a class for each pixel."""
    return [(shape, dtype), ((shape[0], *shape[2:]), "int32")]


def with_numbers(shape: Shape, dtype: str) -> list[Struct]:
    """Logits or probabilities, and as many other numbers."""
    return [(shape, dtype)] * 2


def alone(shape: Shape, dtype: str) -> list[Struct]:
    """Logits or probabilities."""
    return [(shape, dtype)]


def classes_first(shape: Shape, dtype: str) -> list[Struct]:
    """Hidden states, a kernel [classes, features], and a class for each row; the shape is (rows, features, classes)."""
    n, d, v = shape
    return [((n, d), dtype), ((v, d), dtype), ((n,), "int32")]


def classes_last(shape: Shape, dtype: str) -> list[Struct]:
    """The same with a kernel [features, classes]."""
    n, d, v = shape
    return [((n, d), dtype), ((d, v), dtype), ((n,), "int32")]


WIDE = ((8192, 32768), "bfloat16")
MAIN = [WIDE, ((8192, 1000), "float32"), ((65536, 10), "float32")]
IMAGES = ((8, 150, 256, 256), "bfloat16")
LINEAR = ((8192, 2048, 128256), "bfloat16")
EMBEDDINGS = ((16384, 512), "bfloat16")
LABELS = ((8192, 512, 128256), "bfloat16")


class Case(NamedTuple):
    """A function of the library and the one that it is measured by, of the same arrays."""

    ours: Loss
    peer: Loss
    arrays: Callable[[Shape, str], list[Struct]]
    shapes: list[Struct] = [WIDE]
    by: tuple[int, ...] = (0,)  # what the gradient is taken by; () if there is none
    whole: bool = False  # whether the results are wanted as they are, rather than their mean


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _log_p(x: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(_wide(x))


def _at(x: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, labels[:, None], -1)[:, 0]


def _relative(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)


def _several(labels: jax.Array) -> jax.Array:
    """Eight labels for each row."""
    return labels[:, None] + jnp.arange(8)


def _our_sparse(x: jax.Array, labels: jax.Array) -> jax.Array:
    return jaxce.softmax_cross_entropy_with_sparse_labels(x, _several(labels), jnp.full((*labels.shape, 8), 1 / 8))


def _plain_sparse(x: jax.Array, labels: jax.Array) -> jax.Array:
    return -jnp.mean(jnp.take_along_axis(_log_p(x), _several(labels), -1), -1)


def _plain_focal(x: jax.Array, labels: jax.Array) -> jax.Array:
    nll = -_at(_log_p(x), labels)
    return (1 - jnp.exp(-nll)) ** 2 * nll


def _plain_entropy(x: jax.Array) -> jax.Array:
    log_p = _log_p(x)
    return -jnp.sum(jnp.exp(log_p) * log_p, -1)


def _plain_jensen_shannon_with_logits(x: jax.Array, z: jax.Array) -> jax.Array:
    log_p, log_q = _log_p(x), _log_p(z)
    log_m = jnp.logaddexp(log_p, log_q) - math.log(2)
    return (_relative(log_p, log_m) + _relative(log_q, log_m)) / 2


def _plain_jensen_shannon(p: jax.Array, q: jax.Array) -> jax.Array:
    p, q = _wide(p), _wide(q)
    m = (p + q) / 2
    return jnp.sum(rel_entr(p, m) + rel_entr(q, m), -1) / 2


def _plain_smoothing(x: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy(x, optax.smooth_labels(jax.nn.one_hot(labels, x.shape[-1]), 0.1))


def _plain_evaluation(x: jax.Array, labels: jax.Array) -> Any:
    """Sums of nll, accuracy, top 5, Brier score, and of 15 bins of confidence."""
    log_p = _log_p(x)
    p, nll = jnp.exp(log_p), -_at(log_p, labels)
    correct, confidence = jnp.argmax(x, -1) == labels, jnp.max(p, -1)
    top = jnp.sum(x > _at(x, labels)[:, None], -1) < 5
    brier = jnp.sum((p - jax.nn.one_hot(labels, x.shape[-1])) ** 2, -1)
    in_bin = jax.nn.one_hot(jnp.ceil(15 * confidence).astype(jnp.int32) - 1, 15)
    bins = [jnp.sum(in_bin * v[:, None], 0) for v in (correct, confidence, jnp.ones_like(confidence))]
    return bins, [jnp.sum(v) for v in (nll, correct, top, brier)]


def _our_evaluation(x: jax.Array, labels: jax.Array) -> Any:
    return jaxce.metrics.Evaluation.empty().update(x, labels)


def _of_linear(loss: Loss, class_axis: int) -> Loss:
    return lambda h, w, labels: loss(jaxce.LinearLogits(h, w, class_axis=class_axis), labels)


def _of_product(class_axis: int) -> Loss:
    """Optax's loss of all logits, in the precision that ours has."""

    def loss(h: jax.Array, w: jax.Array, labels: jax.Array) -> jax.Array:
        logits = jnp.matmul(h, w.T if class_axis == 0 else w, preferred_element_type=jnp.float32)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)

    return loss


def with_temperature(shape: Shape, dtype: str) -> list[Struct]:
    """Embeddings of both sides of pairs, and a temperature."""
    return [(shape, dtype), (shape, dtype), ((), "float32")]


def _pairs(a: jax.Array, b: jax.Array, temperature: jax.Array) -> jaxce.LinearLogits:
    return jaxce.LinearLogits(a, b, class_axis=0, temperature=temperature)


def _all_pairs(a: jax.Array, b: jax.Array, temperature: jax.Array) -> jax.Array:
    return jnp.matmul(a, b.T, preferred_element_type=jnp.float32) / temperature


def _plain_clip(a: jax.Array, b: jax.Array, temperature: jax.Array) -> Any:
    x, labels = _all_pairs(a, b, temperature), jnp.arange(a.shape[0])
    return tuple(optax.losses.softmax_cross_entropy_with_integer_labels(v, labels) for v in (x, x.T))


def _our_siglip(a: jax.Array, b: jax.Array, temperature: jax.Array) -> jax.Array:
    labels = jnp.arange(a.shape[0])[:, None]
    return jaxce.sigmoid_binary_cross_entropy_with_sparse_labels(_pairs(a, b, temperature), labels)


def _our_siglip_mean(a: jax.Array, b: jax.Array, temperature: jax.Array) -> jax.Array:
    return jaxce.linear_sigmoid_binary_cross_entropy(_pairs(a, b, temperature), jnp.arange(a.shape[0])[:, None])


def _plain_siglip(a: jax.Array, b: jax.Array, temperature: jax.Array) -> jax.Array:
    x = _all_pairs(a, b, temperature)
    return jnp.sum(jax.nn.softplus(jnp.where(jnp.eye(len(x), dtype=bool), -x, x)), -1)


def _our_sparse_binary(h: jax.Array, w: jax.Array, labels: jax.Array) -> jax.Array:
    logits = jaxce.LinearLogits(h, w, class_axis=0)
    return jaxce.sigmoid_binary_cross_entropy_with_sparse_labels(logits, _several(labels))


def _our_sparse_binary_mean(h: jax.Array, w: jax.Array, labels: jax.Array) -> jax.Array:
    return jaxce.linear_sigmoid_binary_cross_entropy(jaxce.LinearLogits(h, w, class_axis=0), _several(labels))


def _plain_sparse_binary(h: jax.Array, w: jax.Array, labels: jax.Array) -> jax.Array:
    x = jnp.matmul(h, w.T, preferred_element_type=jnp.float32)
    return jnp.sum(jax.nn.softplus(x), -1) - jnp.sum(jnp.take_along_axis(x, _several(labels), -1), -1)


def _linear_by_vmap(h: jax.Array, w: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean of each of four sequences."""

    def mean(h: jax.Array, labels: jax.Array) -> jax.Array:
        return jaxce.linear_cross_entropy(jaxce.LinearLogits(h, w, class_axis=0), labels)

    return jax.vmap(mean)(h.reshape(4, -1, h.shape[-1]), labels.reshape(4, -1))


_integer = jaxce.softmax_cross_entropy_with_integer_labels
_optax_integer = optax.losses.softmax_cross_entropy_with_integer_labels

CASES: dict[str, Case] = {
    "integer labels": Case(_integer, _optax_integer, with_integers, MAIN),
    "integer labels, images": Case(
        lambda x, y: _integer(x, y, axis=1), lambda x, y: _optax_integer(_wide(x), y, axis=1), of_images, [IMAGES]
    ),
    "dense labels": Case(jaxce.softmax_cross_entropy, optax.losses.softmax_cross_entropy, with_numbers, MAIN),
    "label smoothing": Case(lambda x, y: _integer(x, y, label_smoothing=0.1), _plain_smoothing, with_integers, MAIN),
    "sparse labels": Case(_our_sparse, _plain_sparse, with_integers),
    "sigmoid": Case(jaxce.sigmoid_binary_cross_entropy, optax.losses.sigmoid_binary_cross_entropy, with_numbers, MAIN),
    "entropy_with_logits": Case(jaxce.entropy_with_logits, _plain_entropy, alone, MAIN),
    "softmax_statistics": Case(jaxce.softmax_statistics, _optax_integer, with_integers, MAIN),
    "focal": Case(jaxce.softmax_focal_loss, _plain_focal, with_integers),
    "poly": Case(jaxce.poly_loss_cross_entropy, optax.losses.poly_loss_cross_entropy, with_numbers),
    "sigmoid focal": Case(jaxce.sigmoid_focal_loss, optax.losses.sigmoid_focal_loss, with_numbers),
    "logsumexp": Case(jaxce.logsumexp, lambda x: jax.nn.logsumexp(_wide(x), -1), alone),
    "log_softmax": Case(lambda x, _: jaxce.log_softmax(x), lambda x, _: _log_p(x), with_numbers, whole=True),
    "cross_entropy_with_logits": Case(
        jaxce.cross_entropy_with_logits,
        lambda x, z: -jnp.sum(jnp.exp(_log_p(x)) * _log_p(z), -1),
        with_numbers,
        by=(0, 1),
    ),
    "relative_entropy_with_logits": Case(
        jaxce.relative_entropy_with_logits, lambda x, z: _relative(_log_p(x), _log_p(z)), with_numbers, by=(0, 1)
    ),
    "jensen_shannon_divergence_with_logits": Case(
        jaxce.jensen_shannon_divergence_with_logits, _plain_jensen_shannon_with_logits, with_numbers, by=(0, 1)
    ),
    "nll": Case(jaxce.nll, lambda log_p, y: -_at(_wide(log_p), y), with_integers),
    "kl_divergence": Case(jaxce.kl_divergence, optax.losses.kl_divergence, with_numbers),
    "kl_divergence_with_log_targets": Case(
        jaxce.kl_divergence_with_log_targets, optax.losses.kl_divergence_with_log_targets, with_numbers
    ),
    "generalized_kl_divergence": Case(
        jaxce.generalized_kl_divergence, optax.losses.generalized_kl_divergence, with_numbers
    ),
    "entropy": Case(jaxce.entropy, lambda p: jnp.sum(entr(_wide(p)), -1), alone),
    "cross_entropy": Case(
        jaxce.cross_entropy, lambda p, q: -jnp.sum(xlogy(_wide(p), _wide(q)), -1), with_numbers, by=(0, 1)
    ),
    "relative_entropy": Case(
        jaxce.relative_entropy, lambda p, q: jnp.sum(rel_entr(_wide(p), _wide(q)), -1), with_numbers, by=(0, 1)
    ),
    "jensen_shannon_divergence": Case(jaxce.jensen_shannon_divergence, _plain_jensen_shannon, with_numbers, by=(0, 1)),
    "Evaluation.update": Case(_our_evaluation, _plain_evaluation, with_integers, by=(), whole=True),
    "LinearLogits [V, D]": Case(_of_linear(_integer, 0), _of_product(0), classes_first, [LINEAR], by=(0, 1)),
    "LinearLogits [D, V]": Case(_of_linear(_integer, 1), _of_product(1), classes_last, [LINEAR], by=(0, 1)),
    "linear_cross_entropy [V, D]": Case(
        _of_linear(jaxce.linear_cross_entropy, 0), _of_product(0), classes_first, [LINEAR], by=(0, 1)
    ),
    "linear_cross_entropy [D, V]": Case(
        _of_linear(jaxce.linear_cross_entropy, 1), _of_product(1), classes_last, [LINEAR], by=(0, 1)
    ),
    "linear_cross_entropy, vmap": Case(_linear_by_vmap, _of_product(0), classes_first, [LINEAR], by=(0, 1)),
    "CLIP, all pairs": Case(
        lambda *sides: jaxce.softmax_cross_entropy_of_pairs(_pairs(*sides)),
        _plain_clip,
        with_temperature,
        [EMBEDDINGS],
        by=(0, 1, 2),
    ),
    "SigLIP, all pairs": Case(_our_siglip, _plain_siglip, with_temperature, [EMBEDDINGS], by=(0, 1, 2)),
    "SigLIP, mean": Case(_our_siglip_mean, _plain_siglip, with_temperature, [EMBEDDINGS], by=(0, 1, 2)),
    "sigmoid, sparse labels, mean": Case(
        _our_sparse_binary_mean, _plain_sparse_binary, classes_first, [LABELS], by=(0, 1)
    ),
    "sigmoid, sparse labels": Case(_our_sparse_binary, _plain_sparse_binary, classes_first, [LABELS], by=(0, 1)),
}

MODES = "value", "value and gradient"


def program(function: Loss, case: Case, mode: str) -> Loss:
    """What a training or an evaluation would compute: the mean over the rows, and its gradient."""

    def mean(*args: Any) -> jax.Array:
        return sum((jnp.mean(_wide(v)) for v in jax.tree.leaves(function(*args))), jnp.zeros(()))

    def pulled_back(x: Any, cotangent: Any) -> Any:
        value, pull = jax.vjp(lambda x: function(x, cotangent), x)
        return value, pull(cotangent.astype(value.dtype))

    if mode == "value":
        return function if case.whole else mean
    return pulled_back if case.whole else jax.value_and_grad(mean, case.by)


def measure(case: Case, place: Any, shape: Shape, dtype: str, mode: str) -> tuple[Report, Report]:
    """The library's program and the peer's."""
    args = [array(place, *struct) for struct in case.arrays(shape, dtype)]
    ours, peer = (report(program(f, case, mode), *args) for f in (case.ours, case.peer))
    return ours, peer


# ------------------------------------------------------------------------------------------------------------ the table


COLUMNS = {
    "gigabytes": ("GB", "{:.3f}"),
    "kernels": ("kernels", "{}"),
    "conditionals": ("conditionals", "{}"),
    "temporary_mb": ("MB", "{:.1f}"),
    "megacycles": ("megacycles", "{:.2f}"),
    "seconds": ("seconds", "{:.1f}"),
}
RATIOS = "gigabytes", "megacycles", "seconds"


def line(cells: list[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def known(kind: str, columns: Iterable[str]) -> list[str]:
    """Those of the columns that there is something to say in."""
    return [column for column in columns if kind == "tpu" or column != "megacycles"]


def heading(kind: str) -> str:
    """The first lines of the table."""
    cells = ["function", "mode", "shape", *(f"{COLUMNS[c][0]}: jaxce / peer" for c in known(kind, COLUMNS))]
    cells += [f"{COLUMNS[c][0]}, ratio" for c in known(kind, RATIOS)]
    return line(cells) + "\n" + "|---" * len(cells) + "|"


def row(kind: str, name: str, mode: str, struct: Struct, ours: Report, peer: Report) -> str:
    """A line for a function."""
    shape, dtype = struct
    cells = [name, mode, f"{'x'.join(map(str, shape))} {dtype}"]
    for column in known(kind, COLUMNS):
        cells.append(" / ".join(COLUMNS[column][1].format(getattr(r, column)) for r in (ours, peer)))
    return line(cells + [f"{getattr(ours, c) / getattr(peer, c):.2f}" for c in known(kind, RATIOS)])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["tpu", "gpu", *TPUS, *GPUS])
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="functions with this in their name")
    args = parser.parse_args()

    place = devices(args.kind)[0]
    args.kind = "gpu" if args.kind in GPUS else "tpu" if args.kind in TPUS else args.kind
    package = "libtpu" if args.kind == "tpu" else "jax-cuda13-plugin"
    print(f"{place.device_kind}, jax {jax.__version__}, {package} {importlib.metadata.version(package)}", end="")
    print(f", optax {optax.__version__}\n\n{heading(args.kind)}", flush=True)
    report(jnp.negative, array(place, (8, 128), "float32"))  # the first waits for the compiler itself
    turns: list[str] = []
    for name, case in CASES.items():
        if any(part in name for part in args.only):
            for struct in case.shapes:
                for mode in MODES if case.by else MODES[:1]:
                    ours, peer = measure(case, place, *struct, mode)
                    print(row(args.kind, name, mode, struct, ours, peer), flush=True)
                    for turn in ours.turns:
                        cycles = f", {turn.megacycles:.2f} megacycles" if args.kind == "tpu" else ""
                        turns.append(f"- {name}, {mode}: {turn.gigabytes:.3f} GB{cycles}")
    if turns:
        print("\nA turn of a loop that turns as often as the data says:\n\n" + "\n".join(turns))


if __name__ == "__main__":
    main()
