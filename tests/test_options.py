"""Options that are numbers, which a user may anneal or learn: any value compiles once, and has its derivative.

The derivatives are held against differences of the plain definitions in float64, which are smooth in the options, at the
ends of their ranges too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import helpers
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import jaxce

RNG = np.random.default_rng(0)
X = (2 * RNG.normal(size=(4, 5))).astype(np.float32)
X[3, 2] += 12  # a confident row
Y = np.array([0, 3, 4, 2], np.int32)
T = RNG.dirichlet(np.ones(5), 4).astype(np.float32)
T[0, 1] = 0
Z, B = X[:, 0], T[:, 0]
HIDDEN, KERNEL = RNG.normal(size=(4, 3)).astype(np.float32), RNG.normal(size=(3, 5)).astype(np.float32)


class Option(NamedTuple):
    """A function of one option, its plain definition, valid values of which the last makes most numbers 0, wrong values."""

    public: Callable[..., Any]
    name: str
    call: Callable[[Any], jax.Array]
    plain: Callable[[float], np.ndarray]
    values: tuple[float, ...]
    wrong: tuple[float, ...]


def widest(array: np.ndarray) -> np.ndarray:
    """In float64 where JAX has it, for differences that mean something."""
    return array.astype(np.float64) if jax.config.jax_enable_x64 and array.dtype == np.float32 else array


def plain_sigmoid(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    x, t = x.astype(np.float64), t.astype(np.float64)
    return np.maximum(x, 0) - x * t + np.log1p(np.exp(-np.abs(x)))


def plain_sigmoid_focal(x: np.ndarray, t: np.ndarray, alpha: float, gamma: float) -> np.ndarray:
    x, t = x.astype(np.float64), t.astype(np.float64)
    p = 1 / (1 + np.exp(-x))
    return (alpha * t + (1 - alpha) * (1 - t)) * (1 - p * t - (1 - p) * (1 - t)) ** gamma * plain_sigmoid(x, t)


def plain_linear(temperature: float, soft_cap: float) -> np.ndarray:
    x = HIDDEN.astype(np.float64) @ KERNEL.astype(np.float64) / temperature
    return helpers.plain_softmax_cross_entropy(soft_cap * np.tanh(x / soft_cap), Y)


def linear(**options: Any) -> jaxce.LinearLogits:
    return jaxce.LinearLogits(widest(HIDDEN), widest(KERNEL), block_size=2, **options)


def loss_of(logits: jaxce.LinearLogits) -> jax.Array:
    return jaxce.softmax_cross_entropy_with_integer_labels(logits, Y)


def of(function: str, name: str, args: Any, plain: Any, values: Any, wrong: Any, **others: Any) -> Option:
    public = getattr(jaxce, function)

    def call(value: Any) -> jax.Array:
        return public(*map(widest, args), **{name: value}, **others)

    return Option(public, name, call, lambda v: plain(*args, **{name: v}, **others), values, wrong)


SHARES, NOT_SHARES = (0.0, 0.1, 1.0), (-0.1, 1.5, np.nan)
FACTORS, NOT_FINITE = (0.0, 0.25, -1.0), (np.inf, np.nan)
EXPONENTS, NOT_EXPONENTS = (0.0, 2.0, 0.5), (-1.0, np.nan)
SIZES, NOT_SIZES = (1.0, 0.7, 3.0), (0.0, -1.0, np.inf)
weights = {"class_weights": np.array([1, 0.5, 2, 0, 1], np.float32)}
softmax, focal, poly = (
    helpers.plain_softmax_cross_entropy,
    helpers.plain_softmax_focal_loss,
    helpers.plain_poly_loss_cross_entropy,
)
integer = "softmax_cross_entropy_with_integer_labels"
OPTIONS = {
    "integer, label_smoothing": of(integer, "label_smoothing", (X, Y), softmax, SHARES, NOT_SHARES, **weights),
    "integer, z_loss": of(integer, "z_loss", (X, Y), softmax, FACTORS, NOT_FINITE),
    "dense, label_smoothing": of("softmax_cross_entropy", "label_smoothing", (X, T), softmax, SHARES, NOT_SHARES),
    "dense, z_loss": of("softmax_cross_entropy", "z_loss", (X, T), softmax, FACTORS, NOT_FINITE),
    "focal, integer": of("softmax_focal_loss", "gamma", (X, Y), focal, EXPONENTS, NOT_EXPONENTS),
    "focal, dense": of("softmax_focal_loss", "gamma", (X, T), focal, EXPONENTS, NOT_EXPONENTS),
    "poly, integer": of("poly_loss_cross_entropy", "epsilon", (X, Y), poly, FACTORS, NOT_FINITE),
    "poly, dense": of("poly_loss_cross_entropy", "epsilon", (X, T), poly, FACTORS, NOT_FINITE),
    "smooth_labels": of(
        "smooth_labels",
        "alpha",
        (T,),
        lambda t, alpha: (1 - alpha) * t.astype(np.float64) + alpha / 5,
        SHARES,
        NOT_SHARES,
    ),
    "sigmoid, label_smoothing": of(
        "sigmoid_binary_cross_entropy",
        "label_smoothing",
        (Z, B),
        lambda x, t, label_smoothing: plain_sigmoid(
            x, (1 - label_smoothing) * t.astype(np.float64) + label_smoothing / 2
        ),
        SHARES,
        NOT_SHARES,
    ),
    "sigmoid focal, alpha": of(
        "sigmoid_focal_loss", "alpha", (Z, B), plain_sigmoid_focal, SHARES, NOT_SHARES, gamma=2.0
    ),
    "sigmoid focal, gamma": of(
        "sigmoid_focal_loss", "gamma", (Z, B), plain_sigmoid_focal, EXPONENTS, NOT_EXPONENTS, alpha=0.3
    ),
    "temperature": Option(
        jaxce.LinearLogits,
        "temperature",
        lambda v: loss_of(linear(temperature=v, soft_cap=2.0)),
        lambda v: plain_linear(v, 2.0),
        SIZES,
        NOT_SIZES,
    ),
    "soft_cap": Option(
        jaxce.LinearLogits,
        "soft_cap",
        lambda v: loss_of(linear(temperature=0.5, soft_cap=v)),
        lambda v: plain_linear(0.5, v),
        SIZES,
        NOT_SIZES,
    ),
    "linear_cross_entropy, label_smoothing": Option(
        jaxce.linear_cross_entropy,
        "label_smoothing",
        lambda v: jaxce.linear_cross_entropy(linear(), Y, label_smoothing=v),
        lambda v: softmax(HIDDEN.astype(np.float64) @ KERNEL.astype(np.float64), Y, label_smoothing=v).mean(),
        SHARES,
        NOT_SHARES,
    ),
    "linear_cross_entropy, z_loss": Option(
        jaxce.linear_cross_entropy,
        "z_loss",
        lambda v: jaxce.linear_cross_entropy(linear(), Y, z_loss=v),
        lambda v: softmax(HIDDEN.astype(np.float64) @ KERNEL.astype(np.float64), Y, z_loss=v).mean(),
        FACTORS,
        NOT_FINITE,
    ),
}
every_option = pytest.mark.parametrize("name", OPTIONS)


def close(got: Any, expected: Any) -> None:
    # float32: numbers up to 10 to some ulp, and squares and differences of them
    np.testing.assert_allclose(np.asarray(got), expected, rtol=5e-6, atol=2e-6)


@every_option
def test_any_value_is_one_program_with_its_derivative(name: str) -> None:
    """Under `jax.jit`: at the ends of the range too, where a Python number would take another path."""
    option = OPTIONS[name]
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def both(value: jax.Array) -> Any:
        one = jnp.ones_like(value)
        return jax.jvp(option.call, (value,), (one,)), jax.grad(lambda v: jnp.sum(option.call(v)))(value)

    for value in option.values:
        (got, tangent), gradient = both(value)
        step = 1e-5
        slope = (option.plain(value + step) - option.plain(value - step)) / (2 * step)
        close(got, option.plain(value))
        close(tangent, slope)
        close(gradient, np.sum(slope))


@every_option
def test_eager_calls_compile_once_for_each_kind_of_number(name: str) -> None:
    """A number that makes no difference is left out; all others are one program, and so are all arrays."""
    option = OPTIONS[name]
    public = option.public if hasattr(option.public, "_cache_size") else getattr(jaxce, integer)
    usual = [v for v in option.values if v not in (0.0, 1.0)]
    wanted = {v: option.plain(v) for v in option.values}
    close(option.call(usual[0]), wanted[usual[0]])
    before = public._cache_size()
    for value in (*usual, *map(np.float32, usual), *map(np.float64, usual)):
        close(option.call(value), wanted[float(min(usual, key=lambda u, v=value: abs(u - float(v))))])
    assert public._cache_size() == before
    for value in option.values:
        close(option.call(value), wanted[value])
        close(option.call(jnp.float32(value)), wanted[value])
    assert public._cache_size() <= before + 2  # without the option, and with an array


some_options = pytest.mark.parametrize(
    "name",
    [
        n if n in ("integer, label_smoothing", "temperature") else pytest.param(n, marks=pytest.mark.slow)
        for n in OPTIONS
    ],
)


@some_options
def test_numbers_of_any_kind(name: str) -> None:
    """Integers, NumPy's and JAX's, and an array without axes are the number they hold."""
    option = OPTIONS[name]
    expected = option.plain(1.0)
    for value in (1, np.int32(1), np.float16(1), np.array(1.0, np.float32), jnp.int32(1), jnp.bfloat16(1)):
        close(option.call(value), expected)


@every_option
def test_python_numbers_are_checked_at_once(name: str) -> None:
    option = OPTIONS[name]
    start = f"^{option.public.__name__}: {option.name} must "
    for wrong in option.wrong:
        for value in wrong, np.float32(wrong):
            with pytest.raises(ValueError, match=start):
                option.call(value)
    for value in True, "0.5", np.ones(2, np.float32), jnp.array(True), 1j:
        with pytest.raises((TypeError, ValueError), match=start):
            option.call(value)


@pytest.mark.slow
@every_option
def test_second_derivatives(name: str) -> None:
    """Both modes, against differences in float64."""
    option = OPTIONS[name]
    with jax.enable_x64(True):  # at 0.3, since the differences go to both sides
        chex.assert_numerical_grads(lambda v: jnp.sum(option.call(v)), (jnp.float64(0.3),), 2, atol=1e-5, rtol=1e-5)


def test_gamma_of_certain_and_of_impossible_labels() -> None:
    """The derivative of (1 - p)^gamma (-log p) by gamma, where 1 - p is nearly 1 or nearly 0."""
    gaps = np.array([-80.0, -50, -20, -1, 0, 1, 20, 60, 80], np.float32)
    x = np.stack([gaps, np.zeros_like(gaps)], -1)
    got = jax.jacfwd(lambda gamma: jaxce.softmax_focal_loss(x, np.ones(len(x), int), gamma=gamma))(jnp.float32(0.5))
    nll = [mpmath.log1p(mpmath.exp(float(gap))) for gap in gaps]
    exact = [mpmath.sqrt(-mpmath.expm1(-a)) * a * mpmath.log(-mpmath.expm1(-a)) for a in nll]
    # A power, a logarithm, a cross-entropy and 1 - p, each right to 2 ulp at least, of which the power's is halved.
    assert np.max(helpers.ulp_error(got, exact)) <= 8


def test_options_may_be_learnt_with_the_logits() -> None:
    """Derivatives by the logits, then by the options."""

    def loss(x: jax.Array, options: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(jaxce.softmax_cross_entropy_with_integer_labels(x, Y, **options))

    options = {"label_smoothing": jnp.float32(0), "z_loss": jnp.float32(0.5)}
    mixed = jax.jit(jax.jacfwd(jax.grad(loss), argnums=1))(X, options)
    right = {
        "label_smoothing": np.eye(5)[Y] - 0.2,
        "z_loss": 2 * jax.nn.logsumexp(X, -1, keepdims=True) * jax.nn.softmax(X),
    }
    chex.assert_trees_all_close(mixed, right, rtol=5e-6, atol=2e-6)


def test_options_are_mapped() -> None:
    for name in "focal, dense", "temperature":
        option = OPTIONS[name]
        values = jnp.array(option.values)
        close(jax.vmap(option.call)(values), [option.plain(v) for v in option.values])


OF_ROWS = [n for n in OPTIONS if "linear" not in n and n.endswith(("smoothing", "z_loss", "alpha", "temperature"))]


@pytest.mark.parametrize("name", [n for n in OF_ROWS if n != "smooth_labels"])
def test_one_number_for_each_row(name: str) -> None:
    """Each row's loss is that with its own number, and the derivative by the numbers is each row's own."""
    option = OPTIONS[name]
    values = np.array([0.4, 0.7, 1.0, 0.5], np.float32)
    each = np.diag([option.plain(float(v)) for v in values])
    step = 1e-5
    slopes = np.diag([(option.plain(v + step) - option.plain(v - step)) / (2 * step) for v in map(float, values)])
    got, slope = jax.jit(jax.value_and_grad(lambda v: (lambda x: (jnp.sum(x), x))(option.call(v)), has_aux=True))(
        values
    )
    close(got[1], each)
    close(slope, slopes)
    close(option.call(list(values.tolist())), each)  # as a list, eagerly


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_of_rows_that_take_no_part(value: float) -> None:
    """They may be anything: also where a mask of entries, or a weight of 0, takes the row away."""
    numbers = np.float32([[0.2, value, 0.7, 0.5], [0.2, 1, 0.7, 0.5]])
    there = np.array([True, False, True, True])
    entries = np.broadcast_to(there[:, None], (4, 5))

    def rows(where: Any, **options: jax.Array) -> jax.Array:
        return jaxce.softmax_cross_entropy_with_integer_labels(linear(**options), Y, where=where)

    def smoothed(v: jax.Array) -> jax.Array:
        return jaxce.softmax_cross_entropy_with_integer_labels(X, Y, where=there, label_smoothing=v, z_loss=v)

    def absent(v: jax.Array) -> jax.Array:  # no class of the row is left, though nothing is masked
        x = jnp.where(there[:, None], X, -jnp.inf)
        return jaxce.softmax_cross_entropy_with_integer_labels(x, Y, label_smoothing=v, z_loss=v)

    def mean(v: jax.Array) -> jax.Array:
        return jaxce.linear_cross_entropy(linear(temperature=v), Y, there, z_loss=v)

    def smoothed_mean(v: jax.Array) -> jax.Array:
        return jaxce.linear_cross_entropy(linear(), Y, there, label_smoothing=v)

    of_rows = [lambda v: rows(there, temperature=v), lambda v: rows(entries, temperature=v), smoothed, absent]
    calls = *of_rows, mean, smoothed_mean
    sums = helpers.quick(lambda v: [jax.value_and_grad(lambda v, f=f: jnp.sum(f(v)))(v) for f in calls])
    got, right = map(sums, numbers)
    chex.assert_trees_all_equal(got, right)
    for total, slope in got:
        assert slope[1] == 0 and np.isfinite(total)
