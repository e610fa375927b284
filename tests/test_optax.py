"""Optax's own tests with jaxce's functions in the place of Optax's, and the differences that the page on migration lists.

Optax's wheel brings its tests along. They are run as they are, in a copy of their module in which the losses are ours, and
all pass but those of functions that jaxce doesn't have. Its docstrings' examples are run alike.
"""

from __future__ import annotations

import doctest
import importlib.util
import re
import types
import unittest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick

import jaxce

OTHER_LOSSES = "jaxce has only cross-entropy and its like"
LEFT_OUT = {
    "CTCTest": OTHER_LOSSES,
    "HingeTest": OTHER_LOSSES,
    "PerceptronTest": OTHER_LOSSES,
    "SparsemaxTest": OTHER_LOSSES,
    "test_deprecated_alias": "jaxce has no names that Optax has given up",
}
"""Classes of tests, and tests, of functions that jaxce doesn't have, and why."""

SHARED = sorted(name for name in jaxce.__all__ if hasattr(optax.losses, name))


def optax_tests(module: str, losses: str) -> list[Any]:
    """The tests of a module of Optax's, in a copy of it in which the module ``losses`` is ours."""
    spec = importlib.util.find_spec(f"optax.losses.{module}")
    if spec is None or spec.loader is None:
        return [pytest.param(None, id=module, marks=pytest.mark.skip(f"this Optax doesn't ship {module}"))]
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert getattr(copy, losses).__name__ == f"optax.losses.{losses}"
    setattr(copy, losses, types.SimpleNamespace(**{name: getattr(jaxce, name) for name in jaxce.__all__}))
    tests = []
    for case in filter(
        lambda value: isinstance(value, type) and issubclass(value, unittest.TestCase), vars(copy).values()
    ):
        for place, name in enumerate(unittest.TestLoader().getTestCaseNames(case)):
            marks: list[Any] = []
            reason = LEFT_OUT.get(case.__name__) or LEFT_OUT.get(name)
            if reason is not None:
                marks = [pytest.mark.xfail(raises=AttributeError, reason=reason)]
            # Of numbered cases of one test, and of the tests of a function that isn't there, one is enough by default.
            if re.search("[1-9]$", name) or place and case.__name__ in LEFT_OUT:
                marks.append(pytest.mark.slow)
            tests.append(pytest.param(case(name), id=f"{case.__name__}.{name}", marks=marks))
    return tests


TESTS = optax_tests("_classification_test", "_classification") + optax_tests("_smoothing_test", "_smoothing")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:mpmath")  # assertWarns touches what every module has
@pytest.mark.parametrize("test", TESTS)
def test_optax(test: unittest.TestCase) -> None:
    np.random.seed(0)  # the global one, from which Optax's tests draw
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        test.debug()  # runs it without catching what it raises


@pytest.mark.parametrize("name", [name for name in SHARED if ">>>" in getattr(optax.losses, name).__doc__])
def test_optax_docstring(name: str) -> None:
    text = getattr(optax.losses, name).__doc__.replace("optax", "jaxce")
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    with np.printoptions():  # the examples set the precision of what is printed
        result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
    assert result.attempted and not result.failed


def integer(losses: Any) -> Any:
    return losses.softmax_cross_entropy_with_integer_labels


def along(loss: Any) -> Any:
    """The derivative in a direction, which is not 0 at the class that isn't there."""
    return jax.jvp(lambda x: loss(x, FIRST), (ABSENT,), (np.array([1, 2, 1], np.float32),))[1]


ROW = np.array([2.0, 1.0, 0.0], np.float32)
SOFTMAX = np.exp(ROW) / np.exp(ROW).sum()
UNIFORM = np.full((3, 3), 1 / 3, np.float32)
CLASSES = np.array([True, True, False])
ABSENT, FIRST = np.array([0, 0, -np.inf], np.float32), np.array([1, 0, 0], np.float32)
LOG_2, LOG_3 = np.log(2.0), np.log(3.0)

# The first words of the page's item: calls, what Optax gives, and what jaxce gives, an error if it is one.
DIFFERENCES: dict[str, list[tuple[Any, Any, Any]]] = {
    "Confident rows": [
        (lambda f: integer(f)(jnp.array([50.0, 0.0, 1.0]), 0), 0.0, np.log1p(np.exp(-50.0) + np.exp(-49.0))),
        (lambda f: jax.grad(integer(f))(jnp.array([50.0, 0.0]), 0)[0], 0.0, -np.exp(-50.0)),
        (lambda f: f.generalized_kl_divergence(jnp.log(UNIFORM[0]), UNIFORM[0]) < 0, True, False),
    ],
    "A label that is no class": [
        (lambda f: integer(f)(ROW, -1), 2.407606, np.nan),
        (lambda f: integer(f)(ROW, 3), np.nan, np.nan),
        (lambda f: jax.grad(integer(f))(ROW, -1), SOFTMAX - [0, 0, 1], [np.nan] * 3),
        (lambda f: jax.grad(integer(f))(ROW, 3), SOFTMAX, [np.nan] * 3),
    ],
    "A label on a masked class": [
        (lambda f: integer(f)(jnp.array([0.0, 5.0, 0.0]), 1, where=np.array([True, False, True])), LOG_2 - 5, np.inf),
    ],
    "A mask with one axis fewer": [
        (
            lambda f: f.kl_divergence(jnp.zeros((3, 3)), UNIFORM, where=CLASSES),
            [-2 / 3 * LOG_3] * 3,
            [-LOG_3, -LOG_3, 0],
        ),
        (lambda f: f.kl_divergence(jnp.zeros((3, 3)), UNIFORM, where=CLASSES[None]), *[[-2 / 3 * LOG_3] * 3] * 2),
        (lambda f: integer(f)(jnp.zeros((3, 3)), np.array([0, 1, 0]), where=CLASSES), *[[LOG_3, LOG_3, 0]] * 2),
    ],
    "A class at -inf": [
        (lambda f: f.softmax_cross_entropy(jnp.array([0, 0, -jnp.inf]), np.array([0.5, 0.5, 0.0])), np.nan, LOG_2),
        (lambda f: f.poly_loss_cross_entropy(jnp.array([0, -jnp.inf]), np.array([1.0, 0.0])), np.nan, 0.0),
        (lambda f: f.kl_divergence(jnp.array([0.0, -jnp.inf]), np.array([1.0, 0.0])), np.nan, 0.0),
        (lambda f: f.poly_loss_cross_entropy(ABSENT, FIRST), np.nan, LOG_2 + 1),
        (lambda f: f.safe_softmax_cross_entropy(ABSENT, FIRST), LOG_2, LOG_2),
        (lambda f: jax.grad(f.softmax_cross_entropy)(ABSENT, FIRST), *[[-0.5, 0.5, 0]] * 2),
        (lambda f: jax.grad(f.safe_softmax_cross_entropy)(ABSENT, FIRST), *[[-0.5, 0.5, 0]] * 2),
        (lambda f: along(f.softmax_cross_entropy), *[0.5] * 2),
        (lambda f: along(f.safe_softmax_cross_entropy), np.nan, 0.5),
    ],
    "Infinite logits": [
        (lambda f: integer(f)(jnp.array([0.0, jnp.inf]), 1), np.nan, 0.0),
        (
            lambda f: f.sigmoid_binary_cross_entropy(jnp.array([jnp.inf, -jnp.inf]), np.array([1.0, 0.0])),
            [np.nan] * 2,
            [0, 0],
        ),
    ],
    "Half precision": [
        (lambda f: integer(f)(jnp.zeros(3, jnp.bfloat16), 0).dtype == jnp.bfloat16, True, False),
        (lambda f: integer(f)(jnp.array(ROW, jnp.bfloat16), 0).astype("float32"), 0.40625, 0.407606),
    ],
    "Dense labels broadcast": [
        (lambda f: f.softmax_cross_entropy(jnp.zeros(3), UNIFORM), [LOG_3] * 3, ValueError),
        (lambda f: f.softmax_cross_entropy(jnp.zeros((3, 3)), UNIFORM[0]), *[[LOG_3] * 3] * 2),
    ],
    "`smooth_labels`": [
        (
            lambda f: f.smooth_labels(np.float32([1, 0, 0]), 0.1, where=CLASSES),
            [0.95, 0.05, 0.05],
            [0.95, 0.05, 0.0],
        ),
    ],
    "`sigmoid_focal_loss`": [
        (lambda f: f.sigmoid_focal_loss(jnp.zeros(1), np.ones(1, np.float32), alpha=-1.0), [-LOG_2 / 4], ValueError),
    ],
}


def bullets() -> list[str]:
    """The page's list of differences, without the items that are about what one of the two doesn't have."""
    page = (Path(__file__).parents[1] / "notebooks" / "migration.md").read_text(encoding="utf-8")
    section = page.partition("## Differences from Optax")[2].partition("\n## ")[0]
    return re.findall(r"^- (.*)$", section, re.M)


def test_the_page_lists_the_differences() -> None:
    listed = bullets()
    assert len(listed) == len(DIFFERENCES)
    for item, words in zip(listed, DIFFERENCES, strict=True):
        assert item.startswith(words)


@pytest.mark.parametrize("words", DIFFERENCES)
def test_difference(words: str) -> None:
    rows = DIFFERENCES[words]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = quick(lambda: [call(optax.losses) for call, _, _ in rows])()
    for (_, there, _), got in zip(rows, theirs, strict=True):
        np.testing.assert_allclose(got, there, rtol=1e-6)  # a few ulp of float32
    values = [(call, here) for call, _, here in rows if not isinstance(here, type)]
    ours = quick(lambda: [call(jaxce) for call, _ in values])()
    for (_, here), got in zip(values, ours, strict=True):
        np.testing.assert_allclose(got, here, rtol=1e-6)
    for call, _, here in rows:
        if isinstance(here, type):
            with pytest.raises(here):
                call(jaxce)
