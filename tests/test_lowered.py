"""What the losses become before they run: for which platform, what is kept for a gradient, and how much memory it takes."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxce

N, D, K = 6, 4, 40
integer = jaxce.softmax_cross_entropy_with_integer_labels
LOSSES: dict[str, Callable[..., jax.Array]] = {  # of logits, labels and targets
    "integer": lambda x, y, t: integer(x, y),
    "integer, modified": lambda x, y, t: integer(x, y, label_smoothing=0.1, z_loss=0.1, where=y > 0),
    "dense": lambda x, y, t: jaxce.softmax_cross_entropy(x, t),
    "focal": lambda x, y, t: jaxce.softmax_focal_loss(x, t),
    "statistics": lambda x, y, t: sum(jaxce.softmax_statistics(x, y)[:3]),
    "relative entropy": lambda x, y, t: jaxce.relative_entropy_with_logits(x, jnp.log(t)),
}


def array(x: jax.Array, _: jax.Array, __: jax.Array) -> Any:
    return x


def linear(_: jax.Array, hidden: jax.Array, kernel: jax.Array) -> Any:
    return jaxce.LinearLogits(hidden, kernel, block_size=16)


def struct(*shape: int, dtype: Any = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


ARGUMENTS = struct(N, K), struct(N, D), struct(D, K), struct(N, dtype="int32"), struct(N, K)


def program(name: str, make: Callable[..., Any]) -> Any:
    def total(x: jax.Array, hidden: jax.Array, kernel: jax.Array, y: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.sum(LOSSES[name](make(x, hidden, kernel), y, t))

    return jax.jit(jax.value_and_grad(total, (0, 1, 2)))


# --- the platform -----------------------------------------------------------------------------------------------------


def conditions(jaxpr: Any) -> Iterator[str]:
    """What every conditional inside is decided by: the primitive that its index comes from."""
    made = {id(v): equation.primitive.name for equation in jaxpr.eqns for v in equation.outvars}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            yield made.get(id(equation.invars[0]), "an argument")
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from conditions(inner)


MAKERS = array, linear
every_loss = pytest.mark.parametrize("name", LOSSES)
some_losses = pytest.mark.parametrize(
    "name", [n if n in ("integer, modified", "dense") else pytest.param(n, marks=pytest.mark.slow) for n in LOSSES]
)


@pytest.mark.parametrize("make", MAKERS)
@some_losses
def test_a_program_is_that_of_the_platform_it_is_for(name: str, make: Callable[..., Any]) -> None:
    """Not of the machine that lowers it; and nothing is decided by what the logits are."""
    traced = program(name, make).trace(*ARGUMENTS)
    assert set(conditions(traced.jaxpr.jaxpr)) == {"platform_index"}
    texts = [traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu", "cuda")]
    # That of a block's cotangent, for a TPU, is in all; those of arrays are for a CPU.
    assert ["optimization_barrier" in text for text in texts] == [True, make is linear, make is linear]
    numbers = [re.findall(r"%\d+:(\d+) = stablehlo.reduce", text) for text in texts]
    if make is array:  # one reduction for a state, of each of two softmaxes, and one for all sums of terms
        passes = {"focal": 2, "relative entropy": 3}.get(name, 1)
        # A CPU gathers the labels, and has one number less to reduce then; a GPU only those of longer rows.
        labelled = name in ("integer", "integer, modified", "statistics")
        assert ["gather" in text for text in texts] == [labelled, False, False]
        assert numbers[1] == numbers[2] and len(numbers[1]) == passes
        assert {int(n) for n in numbers[0]} == {int(numbers[1][0]) - labelled}  # the same numbers meet on a CPU


def test_a_gpu_gathers_the_labels_of_long_rows() -> None:
    shapes = jax.ShapeDtypeStruct((8, 1024), "bfloat16"), jax.ShapeDtypeStruct((8,), "int32")
    traced = jax.jit(jaxce.softmax_cross_entropy_with_integer_labels).trace(*shapes)
    texts = [traced.lower(lowering_platforms=(p,)).as_text() for p in ("tpu", "cuda")]
    assert ["gather" in text for text in texts] == [False, True]
    assert [re.findall(r"%\d+:(\d+) = stablehlo.reduce", text) for text in texts] == [["3"], ["2"]]


def test_a_program_for_all_platforms_holds_the_choice() -> None:
    """And chooses by the platform that it is called on."""
    exported = export.export(program("integer, modified", array), platforms=["cpu", "tpu", "cuda"])(*ARGUMENTS)
    text = exported.mlir_module()
    assert "_platform_index" in text and "stablehlo.case" in text and "optimization_barrier" in text
    rng = np.random.default_rng(0)
    args = tuple(
        jnp.asarray(rng.integers(K, size=s.shape) if s.dtype == "int32" else rng.uniform(size=s.shape), s.dtype)
        for s in ARGUMENTS
    )
    chex.assert_trees_all_equal(exported.call(*args), program("integer, modified", array)(*args))


ROWS, CLASSES = export.symbolic_shape("n, k")
ELEMENTWISE = [
    *("entropy", "surprisal", "perplexity", "mutual_information", "log_softmax", "logsumexp", "smooth_labels"),
    *("cross_entropy", "relative_entropy", "jensen_shannon_divergence", "kl_divergence", "generalized_kl_divergence"),
    *("kl_divergence_with_log_targets", "categorical_cross_entropy", "binary_cross_entropy", "bits_per", "mixture_nll"),
    *("sigmoid_binary_cross_entropy", "sigmoid_focal_loss", "bernoulli_nll", "poisson_nll", "exponential_nll"),
    *("gaussian_nll", "laplace_nll", "gamma_nll", "negative_binomial_nll", "student_t_nll", "weighted_mean"),
    *("jensen_shannon_divergence_with_logits", "cross_entropy_with_logits", "poly_loss_cross_entropy"),
]
ARRAYS = {
    "gaussian_nll": 3,
    "laplace_nll": 3,
    "gamma_nll": 3,
    "negative_binomial_nll": 3,
    "student_t_nll": 4,
} | dict.fromkeys(("entropy", "surprisal", "perplexity", "mutual_information", "log_softmax", "logsumexp"), 1)
"""How many arrays of one shape a function takes, if not two."""


def twice(exported: Any) -> None:
    """That its derivatives of two orders can be exported, too."""
    exported.vjp().vjp()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    "name", [n if n == "integer, modified" else pytest.param(n, marks=pytest.mark.slow) for n in LOSSES]
)
def test_any_number_of_rows_is_exported(name: str, make: Callable[..., Any]) -> None:
    """With as many classes as are given, and of arrays with any number of classes, too."""

    def losses(x: jax.Array, hidden: jax.Array, kernel: jax.Array, y: jax.Array, t: jax.Array) -> jax.Array:
        return LOSSES[name](make(x, hidden, kernel), y, t)

    classes = CLASSES if make is array else K
    args = (
        struct(ROWS, classes),
        struct(ROWS, D),
        struct(D, classes),
        struct(ROWS, dtype="int32"),
        struct(ROWS, classes),
    )
    exported = export.export(jax.jit(losses))(*args)
    twice(exported)
    for rows in (1, 5):
        rng = np.random.default_rng(rows)
        x, hidden, kernel, t = (
            jnp.asarray(rng.uniform(size=s), "float32") for s in ((rows, K), (rows, D), (D, K), (rows, K))
        )
        y = jnp.asarray(rng.integers(K, size=rows), "int32")
        got, right = exported.call(x, hidden, kernel, y, t), losses(x, hidden, kernel, y, t)
        np.testing.assert_allclose(got, right, rtol=2e-6)  # the classes meet in another order


@pytest.mark.parametrize(
    "name", [n if n == "entropy" else pytest.param(n, marks=pytest.mark.slow) for n in ELEMENTWISE]
)
def test_any_number_of_rows_and_classes_is_exported(name: str) -> None:
    """Of whatever takes arrays of one shape."""
    given = [0.1] if name == "smooth_labels" else []
    arrays = [struct(ROWS, CLASSES)] * (1 if given else ARRAYS.get(name, 2))
    twice(export.export(jax.jit(lambda *a: getattr(jaxce, name)(*a, *given)))(*arrays))


def test_own_types_are_written_down() -> None:
    """As arguments and as results, with what isn't an array in them."""
    pytest.importorskip("flatbuffers", reason="serialize needs it")
    h, y = jnp.ones((3, 4)), jnp.array([0, 1, 3])
    m = jaxce.metrics
    for value in (
        jaxce.LinearLogits(h, h.T, bias=jnp.ones(3), class_axis=-1, block_size=2, axis_name=("a", "b")),
        jaxce.ShardedLogits(h, "model"),
        jaxce.softmax_statistics(h, y),
        m.Sum(jnp.ones(()), jnp.zeros(())),
        m.Calibration.from_batch(h, y, bins=4),
        m.TopKAccuracy.from_batch(h, y, k=2),
        m.Evaluation.from_batch(h, y, k=2, bins=4),
        m.Perplexity.empty(),
    ):
        doubled = jax.jit(lambda value: jax.tree.map(lambda x: 2 * x, value))
        back = export.deserialize(export.export(doubled)(value).serialize(vjp_order=1)).call(value)
        assert jax.tree.structure(back) == jax.tree.structure(value)
        chex.assert_trees_all_equal(back, doubled(value))
    assert (
        export.deserialize(export.export(doubled)(m.Evaluation.empty()).serialize())
        .out_tree.unflatten(jax.tree.leaves(m.Evaluation.empty()))
        .options.per_class
    )


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("make", MAKERS)
@every_loss
def test_a_gradient_keeps_only_the_rows_numbers(name: str, make: Callable[..., Any], checkpoint: bool) -> None:
    """Between forward and backward: the arguments and a few numbers of each row; with `jax.checkpoint` the arguments."""

    def losses(*args: jax.Array) -> jax.Array:
        return LOSSES[name](make(*args[:3]), *args[3:])

    function = jax.checkpoint(losses) if checkpoint else losses

    def kept(*args: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(
            jax.vjp(lambda *floats: function(*floats[:3], args[3], floats[3]), *args[:3], args[4])[1]
        )

    of_arguments = [(a.shape, a.dtype) for a in ARGUMENTS]
    others = [s for s in jax.eval_shape(kept, *ARGUMENTS) if (s.shape, s.dtype) not in of_arguments]
    # The largest is a mask of hidden states; nothing has the classes of all rows, or of all features.
    assert all(math.prod(s.shape) <= N * D for s in others), others
    assert not checkpoint or not others, others


# --- memory and time --------------------------------------------------------------------------------------------------


def check_memory(limit: float, function: Callable[..., Any], *args: Any) -> None:
    """Temporary MB of the compiled program; and that it compiles in seconds, on a busy machine too."""
    start = time.perf_counter()
    memory = jax.jit(function).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < limit * 1e6, f"{memory.temp_size_in_bytes / 1e6} MB"
    assert time.perf_counter() - start < 30


def test_many_rows_of_many_classes() -> None:
    """131072 rows of 196608 classes are 51.5 GB in bfloat16: a loss and its gradient need less than 1 percent beside them.

    Measured on CPU, jax 0.10.2 and 0.12.0: 0.14 and 0.34 GB, sums of blocks of the rows. `LinearLogits` have a block of
    2^26 numbers in float32, 0.27 GB, and their gradients in float32, 0.08 GB of 64 features: 0.41 and 0.47 GB in all.
    """
    n, k, d = 131072, 196608, 64
    y = struct(n, dtype="int32")
    check_memory(515, jax.value_and_grad(lambda x, y: jnp.mean(integer(x, y))), struct(n, k, dtype="bfloat16"), y)
    loss = jax.value_and_grad(lambda h, w, y: jnp.mean(integer(jaxce.LinearLogits(h, w), y)), (0, 1))
    check_memory(515, loss, struct(n, d, dtype="bfloat16"), struct(d, k, dtype="bfloat16"), y)
