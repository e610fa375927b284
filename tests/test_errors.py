"""Bad input: one clear error each, which names the function and the argument, when the function is traced."""

from __future__ import annotations

import functools
import inspect
import pickle
import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce
from jaxce import metrics
from jaxce._checks import _ELSEWHERE

X = jnp.zeros((2, 3))
P = jnp.full((2, 3), 1 / 3)
T = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
Y = jnp.array([0, 2])
INTS = jnp.zeros((2, 3), "int32")
BOOLS = jnp.zeros((2, 3), bool)

# function: valid positional arguments, the names of those that must be floating point, and what the second is: numbers
# that broadcast to the first ("dense"), integers ("integer"), or either ("both")
VALID: dict[str, tuple[tuple[Any, ...], tuple[str, ...], str | None]] = {
    "softmax_cross_entropy": ((X, T), ("logits",), "dense"),
    "safe_softmax_cross_entropy": ((X, T), ("logits",), "dense"),
    "softmax_cross_entropy_with_integer_labels": ((X, Y), ("logits",), "integer"),
    "softmax_cross_entropy_with_sparse_labels": ((X, Y[:, None], P[:, :1]), ("logits",), None),
    "softmax_focal_loss": ((X, Y), ("logits",), "both"),
    "poly_loss_cross_entropy": ((X, Y), ("logits",), "both"),
    "smooth_labels": ((T, 0.1), (), None),
    "sigmoid_binary_cross_entropy": ((X, T), ("logits",), "dense"),
    "sigmoid_binary_cross_entropy_with_sparse_labels": ((X, Y[:, None]), ("logits",), None),
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
    "cross_entropy": ((P, T), ("p", "q"), "dense"),
    "relative_entropy": ((P, T), ("p", "q"), "dense"),
    "jensen_shannon_divergence": ((P, T), ("p", "q"), "dense"),
    "mutual_information": ((P,), (), None),
    "differential_entropy": ((jnp.arange(10.0),), (), None),
    "entropy_with_logits": ((X,), ("logits",), None),
    "cross_entropy_with_logits": ((X, X), ("p_logits", "q_logits"), "dense"),
    "relative_entropy_with_logits": ((X, X), ("p_logits", "q_logits"), "dense"),
    "jensen_shannon_divergence_with_logits": ((X, X), ("p_logits", "q_logits"), "dense"),
    "logsumexp": ((X,), ("logits",), None),
    "log_softmax": ((X,), ("logits",), None),
    "softmax_statistics": ((X, Y), ("logits",), "integer"),
    "softmax_cross_entropy_of_pairs": ((X, Y), ("logits",), "integer"),
    "bernoulli_nll": ((X, T), ("logits",), None),
    "gaussian_nll": ((X, X, X), ("location", "log_scale"), None),
    "gaussian_relative_entropy": ((X, X, X, X), ("p_location", "p_log_scale", "q_location", "q_log_scale"), None),
    "laplace_nll": ((X, X, X), ("location", "log_scale"), None),
    "student_t_nll": ((X, X, X, X), ("location", "log_scale", "log_df"), None),
    "exponential_nll": ((X, P), ("log_rate",), None),
    "gamma_nll": ((X, X, P), ("log_concentration", "log_rate"), None),
    "poisson_nll": ((X, INTS), ("log_rate",), None),
    "negative_binomial_nll": ((X, X, INTS), ("log_mean", "log_concentration"), None),
    "multivariate_normal_nll": ((X, jnp.eye(3), X), ("location", "scale_tril"), None),
    "mixture_nll": ((X, X), ("log_weights", "component_nll"), None),
    "weighted_mean": ((X, P), (), None),
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
    "gaussian_relative_entropy",
    "sigmoid_binary_cross_entropy",
    "sigmoid_focal_loss",
    "binary_cross_entropy",
    "surprisal",
    "perplexity",
    "bits_per",
}
WITHOUT_WHERE = WITHOUT_AXIS | {"mutual_information", "differential_entropy", "weighted_mean"}
WITHOUT_AXIS = WITHOUT_AXIS | {"softmax_cross_entropy_of_pairs"}


def bad_calls() -> list[Any]:
    """(id, function, arguments, options, error, argument named in the message)."""
    rows: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = []
    for name, (args, floating, labels) in VALID.items():
        for i, argument in enumerate(floating):
            # Counts and hits are numbers as well. Text is refused by jax.jit, in words of its own.
            for bad in (X.astype(complex), None) if argument in ("joint", "losses") else (INTS, BOOLS, None):
                rows.append((name, (*args[:i], bad, *args[i + 1 :]), {}, TypeError, argument))
        second = SECOND.get(name, "labels")
        if labels == "dense":
            bad_shapes = [T[:, :2], T[None], T[:, :2, None]]
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
    sparse = "sigmoid_binary_cross_entropy_with_sparse_labels"
    rows += [
        ("smooth_labels", (T, -0.1), {}, ValueError, "alpha"),
        ("smooth_labels", (T, 1.5), {}, ValueError, "alpha"),
        ("softmax_focal_loss", (X, Y), {"gamma": -1.0}, ValueError, "gamma"),
        ("softmax_focal_loss", (X, Y), {"gamma": float("nan")}, ValueError, "gamma"),
        ("sigmoid_focal_loss", (X, T), {"gamma": -1.0}, ValueError, "gamma"),
        ("sigmoid_focal_loss", (X, T), {"alpha": 1.5}, ValueError, "alpha"),
        ("poly_loss_cross_entropy", (X, Y), {"epsilon": float("nan")}, ValueError, "epsilon"),
        *((sparse, (X, bad), {}, ValueError, "labels") for bad in (Y, Y[:1, None], jnp.array(0))),
        *((sparse, (X, bad), {}, TypeError, "labels") for bad in (X, BOOLS, None)),
        (sparse, (X, Y[:, None], P), {}, ValueError, "weights"),
        (sparse, (X, Y[:, None], P[:, :1].astype(complex)), {}, TypeError, "weights"),
        *((sparse, (X, Y[:, None]), {"pos_weight": jnp.ones(n)}, ValueError, "pos_weight") for n in (2, (2, 3))),
        (sparse, (X, Y[:, None]), {"pos_weight": jnp.ones(3, complex)}, TypeError, "pos_weight"),
        ("mutual_information", (P,), {"axis": (-1,)}, ValueError, "axis"),
        ("mutual_information", (P[0],), {}, ValueError, "axis"),
        ("gaussian_nll", (X, X[:, :2], X), {}, ValueError, "log_scale"),
        ("gaussian_nll", (X, X, jnp.ones(4)), {}, ValueError, "x"),
        ("poisson_nll", (X, jnp.ones(4, "int32")), {}, ValueError, "counts"),
        ("multivariate_normal_nll", (X, jnp.eye(2), X), {}, ValueError, "scale_tril"),
        ("multivariate_normal_nll", (X, X[0], X), {}, ValueError, "scale_tril"),
        ("multivariate_normal_nll", (X, jnp.ones((4, 3, 3)), X), {}, ValueError, "scale_tril"),
        ("multivariate_normal_nll", (X[0, 0], jnp.eye(3), X), {}, ValueError, "location"),
        ("multivariate_normal_nll", (X, jnp.eye(3), X[:, :2]), {}, ValueError, "x"),
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
    tested_elsewhere = {"linear_cross_entropy", "linear_sigmoid_binary_cross_entropy"}  # in files of their own
    assert functions == set(VALID) | tested_elsewhere


@pytest.mark.parametrize("name", VALID)
def test_the_valid_call_is_valid(name: str) -> None:
    getattr(jaxce, name)(*VALID[name][0])


def message_of(call: Callable[[], Any], name: str, kind: Any = (TypeError, ValueError)) -> str:
    """What a bad call of a function says: one line in the one form, whose hint is right for it, and no frame of ours."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    shown = "softmax_cross_entropy" if name == "safe_softmax_cross_entropy" else name
    assert message.startswith(f"{shown}: ") and "\n" not in message, message
    parameters = parameters_of(name)
    _, _, hint = message.partition("; ")
    assert set(re.findall(r"(\w+)=(?!=)", hint)) <= {*parameters, *JAX_OPTIONS}, message
    words = {*parameters, *jaxce.__all__, *re.findall(r"'(\w+)'", message), *FOREIGN_WORDS}
    assert set(re.findall(r"[a-z]+(?:_[a-z]+)+", hint)) <= words, message
    for called, arguments in re.findall(r"jaxce\.(\w+)\(([\w, ]+)\)", hint):
        assert set(arguments.split(", ")) <= set(parameters_of(called)), message
    files = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert files[-1] == __file__, f"a frame below the caller's: {files}"
    return message


def parameters_of(name: str) -> list[str]:
    return [*inspect.signature(getattr(jaxce, name)).parameters]


JAX_OPTIONS = {"static_argnames"}
FOREIGN_WORDS = {"shard_map", "expand_dims", "static_argnames", "one_hot"}


@pytest.mark.parametrize(("name", "args", "options", "error", "argument"), bad_calls())
def test_bad_call(
    name: str, args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], argument: str
) -> None:
    function: Callable[..., Any] = getattr(jaxce, name)
    message = message_of(lambda: function(*args, **options), name, error)
    assert f": {argument} " in message and ", got " in message, message


IMAGES = jnp.zeros((2, 3, 4, 5))
LINEAR = jaxce.LinearLogits(X, jnp.ones((3, 3)))
CLASSES = [
    "softmax_cross_entropy_with_integer_labels",
    "softmax_focal_loss",
    "softmax_cross_entropy_with_sparse_labels",
]
DENSE = ["softmax_cross_entropy", "sigmoid_binary_cross_entropy", "kl_divergence", "categorical_cross_entropy"]
MISTAKES: list[tuple[list[str], tuple[Any, ...], dict[str, Any], str]] = [  # functions, what was written, what to write
    (CLASSES + DENSE, (), {"reduction": "mean"}, "jaxce.weighted_mean(losses, weights)"),
    (CLASSES + DENSE[:2], (), {"ignore_index": -100}, "where=labels != ignore_index"),
    (["kl_divergence"], (), {"ignore_index": -100}, "; give where=, True for what takes part"),
    (CLASSES + DENSE[:2], (), {"from_logits": True}, "categorical_cross_entropy"),
    (["kl_divergence"], (), {"from_logits": True}, "it takes log-probabilities, such as jaxce.log_softmax(logits)"),
    (CLASSES + DENSE[:1], (), {"weight": jnp.ones(3)}, "class_weights=, one per class"),
    (CLASSES + DENSE, (), {"sample_weight": jnp.ones(3)}, "jaxce.weighted_mean(losses, weights)"),
    (CLASSES + DENSE, (), {"mask": jnp.ones(2, bool)}, "where=, True for what takes part"),
    (CLASSES, (), {"dim": 1}, "axis="),
    (CLASSES, (), {"temperature": 2.0}, "divide the logits by it, or give it to jaxce.LinearLogits"),
    (CLASSES[:2], (Y, X), {}, "logits come first, labels second"),
    (CLASSES[:2], (X, Y[:, None]), {}, "labels[..., 0]"),
    (CLASSES[:1], (X, Y.astype(float)), {}, "labels.astype(int)"),
    (CLASSES[:1], (X, T), {}, "; one number for each class is for softmax_cross_entropy"),
    (["nll", "softmax_statistics"], (X, T), {}, "got float32[2,3]; give labels.argmax(1)"),
    (["linear_cross_entropy"], (LINEAR, T), {}, "got float32[2,3]; give labels.argmax(1)"),
    (
        ["linear_cross_entropy", "linear_sigmoid_binary_cross_entropy"],
        (X, Y),
        {},
        "; give jaxce.LinearLogits(hidden, kernel)",
    ),
    (["linear_cross_entropy"], (LINEAR, Y), {"axis_name": "data"}, "normalizer=jax.lax.psum(weights.sum(), axis_name)"),
    (
        ["sigmoid_binary_cross_entropy", "sigmoid_focal_loss"],
        (LINEAR, T),
        {},
        "got LinearLogits; give logits.materialize()",
    ),
    (
        ["softmax_cross_entropy_of_pairs"],
        (X, X),
        {},
        "; for the embeddings of both sides give jaxce.LinearLogits(logits, labels.T)",
    ),
    (
        ["cross_entropy", "relative_entropy"],
        (X, Y),
        {},
        "; logits with integer labels are for softmax_cross_entropy_with",
    ),
    (["weighted_mean"], (Y.astype(float), jnp.ones((2, 1))), {}, "; give weights.reshape((2,))"),
    (["smooth_labels"], (Y, 0.1), {}, "got int32[2]; give jax.nn.one_hot(labels, classes)"),
    (CLASSES[:1], (), {"gamma": 2.0}, "; it is an argument of softmax_focal_loss"),
    (CLASSES[:1], (), {"normalizer": 2.0}, "; give it to jaxce.weighted_mean(losses, weights)"),
    (["LinearLogits"], (X, T), {"logit_cap": 2.0}, "; give soft_cap="),
    (["LinearLogits"], (X, T), {"scale": 2.0}, "; give temperature=1 / scale"),
    (["LinearLogits"], (X, T), {"transpose": True}, "; give class_axis=0 for a kernel of shape [classes, features]"),
    (["LinearLogits"], (X, jnp.ones((5, 3))), {}, "; if its classes are on axis 0, give class_axis=0"),
    (["softmax_cross_entropy"], (X, Y), {}, "softmax_cross_entropy_with_integer_labels"),
    (["entropy", "entropy_with_logits", "logsumexp"], (INTS,), {}, "must be a floating-point array, got int32[2,3]"),
    (["weighted_mean"], (X,), {"mask": BOOLS}, "; give weights=, True for what takes part"),
    (["weighted_mean"], (X,), {"where": BOOLS}, "; give weights=, True for what takes part"),
    (["weighted_mean"], (X,), {"reduction": "sum"}, "for a sum give normalizer=1"),
    (["weighted_mean"], (X,), {"sample_weight": X}, "; give weights="),
    (["softmax_cross_entropy_with_sparse_labels"], (), {"sample_weight": X}, "jaxce.weighted_mean(losses, weights)"),
    (["sigmoid_binary_cross_entropy"], (), {"weight": 2.0}, "; give pos_weight=, the weight of the positive class"),
    (["softmax_focal_loss"], (), {"alpha": X[0]}, "; give class_weights=, one per class"),
    (["gaussian_nll", "laplace_nll"], (), {"scale": X}, "; give log_scale=, its logarithm"),
    (["multivariate_normal_nll"], (), {"covariance": X}, "; give scale_tril=jnp.linalg.cholesky(covariance)"),
    (["kl_divergence", "relative_entropy"], (), {"dim": 1}, "; give axis="),
    (["kl_divergence"], (), {"input": X}, "; write kl_divergence(log_predictions, targets)"),
    (["categorical_cross_entropy"], (), {"from_logits": True}, "it takes probabilities; logits are for"),
    (["softmax_cross_entropy"], (), {"label_smooting": 0.1}, "did you mean label_smoothing=?"),
    (["entropy"], (P, P), {}, "axis must be an integer or a tuple of integers, got float32[2,3]; cross_entropy and"),
    (["mutual_information"], (P, P), {}, "got float32[2,3]; joint probabilities are one array; relative_entropy"),
    (CLASSES[:2], (X, Y, jnp.ones(2)), {}, "jaxce.weighted_mean(losses, weights)"),
    (["cross_entropy"], (P, P, np.ones(2)), {}, "a mask is where="),
    (["bits_per"], (X, jnp.ones(4)), {}, "count must be a scalar or have the shape of nll"),
    (["softmax_focal_loss"], (), {"gamma": [1.0, 2.0]}, "gamma must be a number of at least 0, got [1.0, 2.0]"),
    (["softmax_focal_loss"], (), {"gamma": np.array([None])}, "gamma must be a number of at least 0, got"),
    (["poly_loss_cross_entropy"], (), {"epsilon": jnp.ones(2)}, "epsilon must be a scalar, got float32[2]"),
    (CLASSES[:1], (X, [[0], [1, 2]]), {}, "labels must be an array of numbers, got [[0], [1, 2]]"),
    (["entropy"], (P, (0, P)), {}, "axis must be an integer or a tuple of integers, got float32[2,3]"),
    (CLASSES[:1], (X, Y, True), {}, "axis must be an integer or a tuple of integers, got True"),
    (
        CLASSES[:1],
        (X,),
        {},
        "missing argument 'labels'; write softmax_cross_entropy_with_integer_labels(logits, labels)",
    ),
    (CLASSES[:1], (X, Y, -1, None, 0.1), {}, "only logits, labels, axis, where may be given by position, got 5"),
    (CLASSES[:1], (X, Y), {"logits": X}, "logits must be given once"),
    (["entropy"], (jnp.array(0.5),), {}, "axis must name an axis, got -1 for a scalar"),
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
        call = functools.partial(getattr(jaxce, name), *(args or VALID[name][0]), **options)
        assert hint in message_of(call, name)


@pytest.mark.parametrize(
    ("name", "foreign"),
    [
        ("laplace_nll", "var"),
        ("student_t_nll", "std"),
        ("smooth_labels", "label_smoothing"),
        ("smooth_labels", "base"),
        ("smooth_labels", "weights"),
        ("log_softmax", "reduction"),
        ("logsumexp", "weights"),
        ("nll", "label_smoothing"),
        ("sigmoid_focal_loss", "soft_cap"),
        ("bits_per", "axis"),
    ],
)
def test_no_hint_where_none_is_right(name: str, foreign: str) -> None:
    message = message_of(lambda: getattr(jaxce, name)(*VALID[name][0], **{foreign: X}), name, TypeError)
    assert message.endswith(f": unexpected keyword {foreign!r}")


@pytest.mark.parametrize("name", VALID)
def test_no_hint_names_an_argument_that_the_function_lacks(name: str) -> None:
    """Every name that arguments have elsewhere, and a mistyped name of each argument."""
    function, args = getattr(jaxce, name), VALID[name][0]
    for foreign in {*_ELSEWHERE} - {*parameters_of(name)}:
        message = message_of(lambda foreign=foreign: function(*args, **{foreign: X}), name, TypeError)
        assert f"unexpected keyword {foreign!r}" in message
    for parameter in parameters_of(name):
        if len(parameter) > 4:
            message = message_of(lambda p=parameter: function(*args, **{p[:-1]: X}), name, TypeError)
            assert f"did you mean {parameter}=?" in message or parameter[:-1] in _ELSEWHERE


class DataFrame:
    __module__ = "pandas.core.frame"
    dtype, shape = np.dtype("float32"), (2, 3)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.zeros((2, 3), np.float32)


class Tensor:  # hashable, as PyTorch's is
    __module__ = "torch"
    dtype, shape = "torch.float32", (2, 3)


@pytest.mark.parametrize("name", VALID)
def test_arrays_of_other_libraries(name: str) -> None:
    args, parameters = VALID[name][0], parameters_of(name)
    for i in range(len(args)):
        for bad, said in ((DataFrame(), "a pandas.DataFrame; give numpy.asarray({})"), (Tensor(), "a torch.Tensor")):
            if parameters[i] == "alpha":
                continue
            message = message_of(lambda i=i, bad=bad: getattr(jaxce, name)(*args[:i], bad, *args[i + 1 :]), name)
            expected = f"{parameters[i]} must be an array of numbers, got {said.format(parameters[i])}"
            assert message.split(": ", 1)[1] == expected


STATIC = {"axis", "base", "full", "method", "window_length"}


@pytest.mark.parametrize("name", VALID)
def test_what_shapes_the_program_is_static(name: str) -> None:
    """An array, or a traced number, in the place of an option that is part of the program."""
    args = VALID[name][0]
    for option in STATIC & {*parameters_of(name)}:
        for bad in (X, np.ones((2, 3)), DataFrame(), Tensor()):
            message = message_of(lambda o=option, b=bad: getattr(jaxce, name)(*args, **{o: b}), name)
            assert f": {option} must be " in message and "[2,3]" in message
        traced = jax.jit(lambda value, o=option: getattr(jaxce, name)(*args, **{o: value}))
        message = message_of(lambda f=traced: traced_call(f, 2), name)
        assert f": {option} must be " in message and ", got a traced int32[]; name it in static_argnames" in message


def traced_call(function: Callable[..., Any], value: Any) -> None:
    """The call, and its error without the frames of `jax.jit`, which calls what it compiles."""
    try:
        function(value)
    except TypeError as error:
        frames = [frame for frame in frames_of(error) if "jax/_src" not in frame]
        assert frames[-1] == __file__
        error.__traceback__ = None
        raise


def frames_of(error: BaseException) -> Iterator[str]:
    return (frame.filename for frame in traceback.extract_tb(error.__traceback__))


def test_an_error_is_a_plain_one() -> None:
    """To whoever reads, catches or pickles it; of nested functions it names the one that was called."""
    for call, kind in ((lambda: jaxce.entropy(INTS), TypeError), (lambda: jaxce.entropy(P, axis=5), ValueError)):
        with pytest.raises(kind) as caught:
            call()
        assert traceback.format_exception_only(caught.value) == [f"{kind.__name__}: {caught.value}\n"]
        copy = pickle.loads(pickle.dumps(caught.value))
        assert type(copy) is kind and str(copy) == str(caught.value)
    logits = jaxce.LinearLogits(X, X.T)
    with pytest.raises(ValueError, match="^linear_cross_entropy: normalizer must be a scalar"):
        jaxce.linear_cross_entropy(logits, Y, normalizer=jnp.ones(7))


def test_all_frames_are_shown_where_jax_shows_its_own() -> None:
    jax.config.update("jax_traceback_filtering", "off")
    try:
        with pytest.raises(TypeError) as caught:
            jaxce.entropy(INTS)
    finally:
        jax.config.update("jax_traceback_filtering", "auto")
    assert next(reversed([*frames_of(caught.value)])).endswith("_checks.py")


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"block_size": 0}, "block_size must be None or a positive integer, got 0"),
        ({"block_size": float("nan")}, "block_size must be None or a positive integer, got nan"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"softcap": 30.0}, "unexpected keyword 'softcap'; give soft_cap="),
        ({"kernel": X.T}, "kernel must be given once"),
        ({"class_axis": 0}, "kernel must have as many features as hidden, 3"),
    ],
)
def test_a_bad_constructor(options: dict[str, Any], hint: str) -> None:
    assert hint in message_of(lambda: jaxce.LinearLogits(X, X.T, **options), "LinearLogits")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: metrics.Accuracy.from_batch(X, Y, mask=Y),
            "Accuracy: unexpected keyword 'mask'; give where=, True for",
        ),
        (
            lambda: metrics.Accuracy.empty().update(X, Y, mask=Y),
            "Accuracy: unexpected keyword 'mask'; give where=, True",
        ),
        (
            lambda: metrics.Accuracy.from_batch(X),
            "Accuracy: missing argument 'labels'; write Accuracy.from_batch(logits, labels)",
        ),
        (
            lambda: metrics.Accuracy.from_batch(Y, X),
            "Accuracy: logits must be a floating-point array, got int32[2]; logits",
        ),
        (lambda: metrics.Brier.from_batch(X, T), "Brier: labels must be an integer array, got float32[2,3]"),
        (lambda: metrics.Perplexity.from_batch(Y), "Perplexity: "),
        (lambda: metrics.Evaluation.empty(k=0), "Evaluation: k must be a positive integer, got 0"),
    ],
)
def test_a_metric_says_its_own_name(call: Callable[[], Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value).startswith(said)
    assert [*frames_of(caught.value)][-1] == __file__


@pytest.mark.parametrize("two", [2, np.int64(2), np.uint8(2), np.float32(2), np.array(2), jnp.array(2)], ids=repr)
def test_integers_of_any_kind_are_numbers(two: Any) -> None:
    def same(call: Callable[[Any], Any], *, as_float: bool = True) -> None:
        np.testing.assert_array_equal(call(two), call(2.0 if as_float else 2), strict=True)

    same(lambda n: jaxce.softmax_cross_entropy(X + T, T, z_loss=n))
    same(lambda n: jaxce.softmax_focal_loss(X + T, Y, gamma=n))
    same(lambda n: jaxce.LinearLogits(X + T, X.T + T.T, soft_cap=n, temperature=n).materialize())
    same(lambda n: jaxce.entropy(P, base=n))
    same(lambda n: jaxce.weighted_mean(X + T, n, normalizer=n))
    same(lambda n: jaxce.bits_per(X + T, n))
    same(lambda n: jaxce.perplexity(n))
    same(lambda n: jaxce.gaussian_nll(n, n, n + 1))
    if not isinstance(two, np.floating):
        same(lambda n: jaxce.entropy(jnp.ones((1, 1, 3)), axis=n), as_float=False)
        same(lambda n: jaxce.entropy(jnp.ones((1, 1, 3)), axis=[n, 0]), as_float=False)
        same(lambda n: jaxce.softmax_cross_entropy_with_integer_labels(X[0], n), as_float=False)
        same(lambda n: jaxce.differential_entropy(jnp.arange(10.0), window_length=n), as_float=False)
    assert jaxce.LinearLogits(X, X.T, block_size=two).block_size == 2


@pytest.mark.parametrize(
    "name", sorted(ELEMENTWISE | {"surprisal", "sigmoid_binary_cross_entropy", "binary_cross_entropy"})
)
def test_python_integers_are_numbers(name: str) -> None:
    args = VALID[name][0]
    if name != "multivariate_normal_nll":
        integers, floats = [1] * len(args), [1.0] * len(args)
        np.testing.assert_array_equal(getattr(jaxce, name)(*integers), getattr(jaxce, name)(*floats), strict=True)


def test_python_booleans_are_truth_values() -> None:
    assert jaxce.gaussian_nll(0.0, 0.0, 1.0, where=False) == 0 < jaxce.gaussian_nll(0.0, 0.0, 1.0, where=True)
    assert jaxce.sigmoid_binary_cross_entropy(1.0, True) == jaxce.sigmoid_binary_cross_entropy(1.0, np.bool_(True))
    assert jaxce.weighted_mean(X + T, True) == jaxce.weighted_mean(X + T)


def test_a_count_may_be_beyond_32_bits() -> None:
    assert jaxce.bits_per(1.0, 5_000_000_000) == jaxce.bits_per(1.0, 5e9) > 0


def test_shapes_and_dtypes_are_enough_for_linear_logits() -> None:
    """For `jax.eval_shape` and for lowering."""
    hidden, kernel = jax.ShapeDtypeStruct((2, 3), "float32"), jax.ShapeDtypeStruct((3, 5), "bfloat16")
    logits = jaxce.LinearLogits(hidden, kernel, bias=jax.ShapeDtypeStruct((5,), "float32"))
    assert jax.eval_shape(jaxce.logsumexp, logits).shape == (2,)
    assert logits.dtype == "float32" and repr(logits).startswith("LinearLogits(float32[2,5] ")
    for shape in (), (2,):
        numbers = {
            "temperature": jax.ShapeDtypeStruct(shape, "float32"),
            "soft_cap": jax.ShapeDtypeStruct((), "float32"),
        }
        assert jax.eval_shape(jaxce.logsumexp, jaxce.LinearLogits(hidden, kernel, **numbers)).shape == (2,)
    with pytest.raises(TypeError, match="kernel must be a floating-point array, got int32"):
        jaxce.LinearLogits(hidden, jax.ShapeDtypeStruct((3, 5), "int32"))


def test_lists_and_numpy_arrays_are_arrays() -> None:
    expected = jaxce.softmax_cross_entropy_with_integer_labels(X, Y)
    got = jaxce.softmax_cross_entropy_with_integer_labels(np.zeros((2, 3), np.float32), np.array([0, 2]))
    assert jnp.array_equal(got, expected)
    for dtype in ("int8", "uint8", "int32", "uint32"):
        assert jnp.array_equal(jaxce.softmax_cross_entropy_with_integer_labels(X, Y.astype(dtype)), expected)
