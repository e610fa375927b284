"""Bad input: one clear error each, which names the function and the argument, when the function is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce

X = jnp.zeros((2, 3))
P = jnp.full((2, 3), 1 / 3)
T = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
Y = jnp.array([0, 2])
INTS = jnp.zeros((2, 3), "int32")
BOOLS = jnp.zeros((2, 3), bool)

# function: valid positional arguments, the names of those that must be floating point, and what the second is: numbers
# that broadcast to the first ("dense"), integers ("integer"), either ("both"), or of the very shape of the first ("exact")
VALID: dict[str, tuple[tuple[Any, ...], tuple[str, ...], str | None]] = {
    "softmax_cross_entropy": ((X, T), ("logits",), "dense"),
    "safe_softmax_cross_entropy": ((X, T), ("logits",), "dense"),
    "softmax_cross_entropy_with_integer_labels": ((X, Y), ("logits",), "integer"),
    "softmax_cross_entropy_with_sparse_labels": ((X, Y[:, None], P[:, :1]), ("logits",), None),
    "softmax_focal_loss": ((X, Y), ("logits",), "both"),
    "poly_loss_cross_entropy": ((X, Y), ("logits",), "both"),
    "smooth_labels": ((T, 0.1), (), None),
    "sigmoid_binary_cross_entropy": ((X, T), ("logits",), "dense"),
    "sigmoid_focal_loss": ((X, T), ("logits",), "dense"),
    "categorical_cross_entropy": ((P, T), ("probs",), "dense"),
    "categorical_cross_entropy_with_integer_labels": ((P, Y), ("probs",), "integer"),
    "binary_cross_entropy": ((P, T), ("probs",), "dense"),
    "kl_divergence": ((X, T), ("log_predictions",), "dense"),
    "kl_divergence_with_log_targets": ((X, X), ("log_predictions", "log_targets"), "dense"),
    "generalized_kl_divergence": ((X, T), ("log_predictions",), "dense"),
    "nll": ((X, Y), ("log_probs",), "integer"),
    "surprisal": ((P,), ("p",), None),
    "entropy": ((P,), ("p",), None),
    "cross_entropy": ((P, T), ("p", "q"), "exact"),
    "relative_entropy": ((P, T), ("p", "q"), "exact"),
    "jensen_shannon_divergence": ((P, T), ("p", "q"), "exact"),
    "mutual_information": ((P,), ("joint",), None),
    "differential_entropy": ((jnp.arange(10.0),), ("samples",), None),
    "entropy_with_logits": ((X,), ("logits",), None),
    "cross_entropy_with_logits": ((X, X), ("p_logits", "q_logits"), "exact"),
    "relative_entropy_with_logits": ((X, X), ("p_logits", "q_logits"), "exact"),
    "jensen_shannon_divergence_with_logits": ((X, X), ("p_logits", "q_logits"), "exact"),
    "logsumexp": ((X,), ("logits",), None),
    "log_softmax": ((X,), ("logits",), None),
    "softmax_statistics": ((X, Y), ("logits",), "integer"),
    "bernoulli_nll": ((X, T), ("logits",), None),
    "gaussian_nll": ((X, X, X), ("location", "log_scale"), None),
    "laplace_nll": ((X, X, X), ("location", "log_scale"), None),
    "student_t_nll": ((X, X, X, X), ("location", "log_scale", "log_df"), None),
    "exponential_nll": ((X, P), ("log_rate",), None),
    "gamma_nll": ((X, X, P), ("log_concentration", "log_rate"), None),
    "poisson_nll": ((X, INTS), ("log_rate",), None),
    "negative_binomial_nll": ((X, X, INTS), ("log_mean", "log_concentration"), None),
    "multivariate_normal_nll": ((X, jnp.eye(3), X), ("location", "scale_tril"), None),
    "mixture_nll": ((X, X), ("log_weights", "component_nll"), None),
    "weighted_mean": ((X, P), ("losses",), None),
    "perplexity": ((X,), ("nll",), None),
    "bits_per": ((X, jnp.ones((2, 3), "int32")), ("nll",), None),
}
SECOND = {  # the name of the second argument, where it isn't labels
    "kl_divergence": "targets",
    "kl_divergence_with_log_targets": "log_targets",
    "generalized_kl_divergence": "targets",
    "cross_entropy": "q",
    "relative_entropy": "q",
    "jensen_shannon_divergence": "q",
    "cross_entropy_with_logits": "q_logits",
    "relative_entropy_with_logits": "q_logits",
    "jensen_shannon_divergence_with_logits": "q_logits",
}
WITH_BASE = [
    "surprisal",
    "entropy",
    "cross_entropy",
    "relative_entropy",
    "jensen_shannon_divergence",
    "mutual_information",
    "differential_entropy",
    "entropy_with_logits",
    "cross_entropy_with_logits",
    "relative_entropy_with_logits",
    "jensen_shannon_divergence_with_logits",
    "perplexity",
]
ELEMENTWISE = {name for name in VALID if name.endswith("_nll") and name != "mixture_nll"}
WITHOUT_AXIS = ELEMENTWISE | {
    "sigmoid_binary_cross_entropy",
    "sigmoid_focal_loss",
    "binary_cross_entropy",
    "surprisal",
    "perplexity",
    "bits_per",
}
WITHOUT_WHERE = WITHOUT_AXIS | {"mutual_information", "differential_entropy", "weighted_mean"}


def bad_calls() -> list[Any]:
    """(id, function, arguments, options, error, argument named in the message)."""
    rows: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = []
    for name, (args, floating, labels) in VALID.items():
        for i, argument in enumerate(floating):
            # Counts and hits are numbers as well. Text is refused by jax.jit, in words of its own.
            for bad in (X.astype(complex), None) if argument in ("joint", "losses") else (INTS, BOOLS, None):
                rows.append((name, (*args[:i], bad, *args[i + 1 :]), {}, TypeError, argument))
        second = SECOND.get(name, "labels")
        if labels in ("dense", "exact"):
            bad_shapes = [T[:, :2], T[None], T[:, :2, None]] + ([T[:1], T[0]] if labels == "exact" else [])
            rows += [(name, (args[0], bad), {}, ValueError, second) for bad in bad_shapes]
            rows += [(name, (args[0], bad), {}, TypeError, second) for bad in (None, T.astype(complex))]
        if labels in ("integer", "both"):
            bad_shapes = [Y[:1], Y[None], Y[:, None], jnp.array(0)]
            rows += [(name, (args[0], bad), {}, ValueError, second) for bad in bad_shapes]
        if labels == "integer":
            rows.append((name, (args[0], Y.astype(bool)), {}, TypeError, second))
            rows.append((name, (args[0], Y.astype("float32")), {}, TypeError, second))
        if labels == "both":
            rows.append((name, (args[0], T[:, :2]), {}, ValueError, second))
        if name not in WITHOUT_AXIS:
            for axis in (2, -3, (0, 0), (1, -1)):
                if name == "differential_entropy" and axis != 2 or name == "weighted_mean" and axis is None:
                    continue
                rows.append((name, args, {"axis": axis}, ValueError, "axis"))
            rows.append((name, args, {"axis": 0.5}, TypeError, "axis"))
        if name not in WITHOUT_WHERE:
            rows.append((name, args, {"where": jnp.ones(5, bool)}, ValueError, "where"))
            rows.append((name, args, {"where": jnp.ones((2, 3))}, TypeError, "where"))
            rows.append((name, args, {"where": jnp.ones(3, bool)}, ValueError, "where"))
        if name in WITH_BASE:
            rows += [(name, args, {"base": base}, ValueError, "base") for base in (0, -2.0, 1, float("nan"))]
            rows.append((name, args, {"base": "two"}, TypeError, "base"))
    for name in ("softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"):
        args = VALID[name][0]
        for value in (-0.1, 1.1, float("nan")):
            rows.append((name, args, {"label_smoothing": value}, ValueError, "label_smoothing"))
        rows.append((name, args, {"label_smoothing": "a bit"}, TypeError, "label_smoothing"))
        for weights in (jnp.ones(2), jnp.ones(4), jnp.ones((1, 3)), jnp.ones((2, 3))):
            rows.append((name, args, {"class_weights": weights}, ValueError, "class_weights"))
        rows.append((name, args, {"class_weights": jnp.ones(3, complex)}, TypeError, "class_weights"))
        for value in (float("nan"), float("inf")):
            rows.append((name, args, {"z_loss": value}, ValueError, "z_loss"))
    rows += [
        ("smooth_labels", (T, -0.1), {}, ValueError, "alpha"),
        ("smooth_labels", (T, 1.5), {}, ValueError, "alpha"),
        ("softmax_focal_loss", (X, Y), {"gamma": -1.0}, ValueError, "gamma"),
        ("softmax_focal_loss", (X, Y), {"gamma": float("nan")}, ValueError, "gamma"),
        ("sigmoid_focal_loss", (X, T), {"gamma": -1.0}, ValueError, "gamma"),
        ("sigmoid_focal_loss", (X, T), {"alpha": 1.5}, ValueError, "alpha"),
        ("poly_loss_cross_entropy", (X, Y), {"epsilon": float("nan")}, ValueError, "epsilon"),
        ("mutual_information", (P,), {"axis": (-1,)}, ValueError, "axis"),
        ("mutual_information", (P[0],), {}, ValueError, "axis"),
        ("gaussian_nll", (X, X[:, :2], X), {}, ValueError, "log_scale"),
        ("gaussian_nll", (X, X, jnp.ones(4)), {}, ValueError, "x"),
        ("poisson_nll", (X, jnp.ones(4, "int32")), {}, ValueError, "counts"),
        ("multivariate_normal_nll", (X, jnp.eye(2), X), {}, ValueError, "scale_tril"),
        ("multivariate_normal_nll", (X, X[0], X), {}, ValueError, "scale_tril"),
        ("multivariate_normal_nll", (X, jnp.ones((4, 3, 3)), X), {}, ValueError, "scale_tril"),
        ("multivariate_normal_nll", (X[0, 0], jnp.eye(3), X), {}, ValueError, "location"),
        ("multivariate_normal_nll", (X, jnp.eye(3), X[:, :2]), {}, ValueError, "location"),
        ("mixture_nll", (X, X[:, :2]), {}, ValueError, "component_nll"),
        ("weighted_mean", (X, jnp.ones((2, 4))), {}, ValueError, "weights"),
        ("differential_entropy", (jnp.arange(10.0),), {"method": "guess"}, ValueError, "method"),
        ("differential_entropy", (jnp.arange(10.0),), {"window_length": 5}, ValueError, "window_length"),
        ("differential_entropy", (jnp.arange(10.0),), {"window_length": 0}, ValueError, "window_length"),
    ]

    def describe(value: Any) -> str:
        return f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else repr(value)

    def title(row: Any) -> str:
        return f"{row[0]}({', '.join(map(describe, row[1]))}; {describe_options(row[2])})"

    return [pytest.param(*row, id=title(row)) for row in rows]


def describe_options(options: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v.shape if hasattr(v, 'shape') else v}" for k, v in options.items())


def test_the_table_covers_every_public_function() -> None:
    functions = {n for n in jaxce.__all__ if callable(getattr(jaxce, n)) and not isinstance(getattr(jaxce, n), type)}
    only_linear = {"linear_cross_entropy"}  # takes no array of logits: see test_linear_cross_entropy.py
    assert functions == set(VALID) | only_linear


@pytest.mark.parametrize("name", VALID)
def test_the_valid_call_is_valid(name: str) -> None:
    getattr(jaxce, name)(*VALID[name][0])


@pytest.mark.parametrize(("name", "args", "options", "error", "argument"), bad_calls())
def test_bad_call(
    name: str, args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], argument: str
) -> None:
    function: Callable[..., Any] = getattr(jaxce, name)
    with pytest.raises(error) as caught:
        function(*args, **options)
    message = str(caught.value)
    shown = "softmax_cross_entropy" if name == "safe_softmax_cross_entropy" else name
    assert message.startswith(f"{shown}: {argument} "), message
    assert ", got " in message


IMAGES = jnp.zeros((2, 3, 4, 5))
CLASSES = [
    "softmax_cross_entropy_with_integer_labels",
    "softmax_focal_loss",
    "softmax_cross_entropy_with_sparse_labels",
]
DENSE = ["softmax_cross_entropy", "sigmoid_binary_cross_entropy", "kl_divergence", "categorical_cross_entropy"]
MISTAKES: list[tuple[list[str], tuple[Any, ...], dict[str, Any], str]] = [  # functions, what was written, what to write
    (CLASSES + DENSE, (), {"reduction": "mean"}, "jaxce.weighted_mean(losses)"),
    (CLASSES + DENSE, (), {"ignore_index": -100}, "where=labels != ignore_index"),
    (CLASSES + DENSE, (), {"from_logits": True}, "categorical_cross_entropy"),
    (CLASSES + DENSE, (), {"weight": jnp.ones(3)}, "class_weights=, one per class"),
    (CLASSES + DENSE, (), {"sample_weight": jnp.ones(3)}, "jaxce.weighted_mean(losses, weights)"),
    (CLASSES + DENSE, (), {"mask": jnp.ones(2, bool)}, "where=, True for what takes part"),
    (CLASSES, (), {"dim": 1}, "axis="),
    (CLASSES, (), {"temperature": 2.0}, "divide the logits by it, or give it to jaxce.LinearLogits"),
    (CLASSES[:2], (Y, X), {}, "logits come first, labels second"),
    (CLASSES[:2], (X, Y[:, None]), {}, "labels[..., 0]"),
    (CLASSES[:1], (X, Y.astype(float)), {}, "labels.astype(int)"),
    (CLASSES[:1], (X, T), {}, "without integer_labels in its name"),
    (["softmax_cross_entropy"], (X, Y), {}, "with_integer_labels in its name"),
    (["categorical_cross_entropy_with_integer_labels", "nll"], (X, Y[:, None]), {}, "labels[..., 0]"),
    (CLASSES[:2], (IMAGES, jnp.zeros((2, 4, 5), int)), {}, "axis=1"),
    (CLASSES[:2], (IMAGES, jnp.zeros((2, 3, 4, 1), int)), {}, "labels[..., 0]"),
    (CLASSES[:1], (X, Y, -1, jnp.ones(2)), {}, "where=mask != 0"),
    (CLASSES[:1], (X, Y, -1, jnp.ones(2)), {}, "jaxce.weighted_mean(losses, weights)"),
    (CLASSES[:1], (X, Y, -1, jnp.ones(3, bool)), {}, "where[None]"),
    (CLASSES[:1], (X, [0, 2**33]), {}, "integers of 32 bits"),
    (CLASSES[:1], (X, ["cat", "dog"]), {}, "labels must be an array of numbers"),
    (["softmax_cross_entropy"], (X[:, :2], T), {}, "(2, 2)"),
    (["softmax_cross_entropy"], (X[:, :2], T), {}, "float32[2,3]"),
]


@pytest.mark.parametrize(("names", "args", "options", "hint"), MISTAKES, ids=[f"{m[0][0]}: {m[3]}" for m in MISTAKES])
def test_likely_mistakes(names: list[str], args: tuple[Any, ...], options: dict[str, Any], hint: str) -> None:
    """What people write who come from elsewhere is answered in one line with what to write."""
    for name in names:
        with pytest.raises((TypeError, ValueError)) as caught:
            getattr(jaxce, name)(*(args or VALID[name][0]), **options)
        message = str(caught.value)
        assert message.startswith(f"{name}: ") and hint in message and "\n" not in message, message


def test_what_shapes_the_program_is_static() -> None:
    """An option that is traced is an error, of jax.jit's own words, and not a leak or a ConcretizationTypeError."""
    for function, args, option in [
        (jaxce.entropy_with_logits, (X,), "base"),
        (jaxce.softmax_cross_entropy, (X, T), "axis"),
    ]:
        with pytest.raises((TypeError, ValueError), match=f"{option}|static arguments"):
            jax.jit(lambda value, f=function, a=args, o=option: f(*a, **{o: value}))(0.5)


def test_lists_and_numpy_arrays_are_arrays() -> None:
    expected = jaxce.softmax_cross_entropy_with_integer_labels(X, Y)
    got = jaxce.softmax_cross_entropy_with_integer_labels(np.zeros((2, 3), np.float32), np.array([0, 2]))
    assert jnp.array_equal(got, expected)
    for dtype in ("int8", "uint8", "int32", "uint32"):
        assert jnp.array_equal(jaxce.softmax_cross_entropy_with_integer_labels(X, Y.astype(dtype)), expected)
