"""Streaming evaluation: the same as scikit-learn's on all the data at once, however the data is cut up."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
import pickle
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import sklearn.calibration
import sklearn.metrics
from helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jaxce
from jaxce import _platforms
from jaxce._state import Block
from jaxce.metrics import (
    Accuracy,
    BinaryAccuracy,
    BinaryBrier,
    BinaryCalibration,
    BinaryEvaluation,
    BinaryEvaluationResult,
    BitsPer,
    Brier,
    Calibration,
    Evaluation,
    EvaluationResult,
    Mean,
    Perplexity,
    Sum,
    TopKAccuracy,
)

N, K = 96, 40  # XLA compiles rows of more than 32 classes faster
NAN, INF = math.nan, math.inf
close = functools.partial(np.testing.assert_allclose, rtol=1e-6)  # a few eps of float32


def data(count: int = N) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    logits = (2 * rng.normal(size=(count, K))).astype("float32")
    labels = np.where(rng.uniform(size=count) < 0.6, logits.argmax(-1), rng.integers(K, size=count)).astype("int32")
    return logits, labels, rng.uniform(0.1, 2, size=count).astype("float32"), rng.integers(1, 5, size=count)


def exact(logits: Any, labels: Any, w: Any, units: Any, bins: int = 15) -> dict[str, Any]:
    """The definitions, in float64."""
    x, w = np.asarray(logits, float), np.asarray(w, float)
    p = scipy.special.softmax(x, -1)
    nll = -scipy.special.log_softmax(x, -1)[np.arange(len(x)), labels]
    confidence, correct = p.max(-1), x.argmax(-1) == labels
    place = np.clip(np.ceil(confidence * bins) - 1, 0, bins - 1)
    gap = sum(abs(np.sum((w * (correct - confidence))[place == b])) for b in range(bins))
    return {
        "nll": np.average(nll, weights=w),
        "perplexity": np.exp(np.average(nll, weights=w)),
        "bits_per_unit": np.sum(w * nll) / math.log(2) / np.sum(w * units),
        "accuracy": np.average(correct, weights=w),
        "calibration_error": gap / w.sum(),
        "brier": np.average(((p - np.eye(K)[labels]) ** 2).sum(-1), weights=w),
    }


@functools.cache
def whole() -> EvaluationResult:
    logits, labels, w, units = data()
    return Evaluation.from_batch(logits, labels, w, units=units).compute()


def test_evaluation_is_the_definition() -> None:
    logits, labels, w, units = data()
    result = whole()
    for name, value in exact(logits, labels, w, units).items():
        close(getattr(result, name), value, err_msg=name)


def test_sklearn() -> None:
    logits, labels, w, _ = data()
    result = whole()
    p, classes = scipy.special.softmax(logits.astype(float), -1), np.arange(K)
    close(result.nll, sklearn.metrics.log_loss(labels, p, sample_weight=w, labels=classes))
    close(result.accuracy, sklearn.metrics.accuracy_score(labels, p.argmax(-1), sample_weight=w))
    close(
        result.top_k_accuracy,
        sklearn.metrics.top_k_accuracy_score(labels, p, k=5, sample_weight=w, labels=classes),
    )
    two = [sklearn.metrics.brier_score_loss(labels == k, p[:, k], sample_weight=w) for k in range(K)]
    close(result.brier, sum(two))


@pytest.mark.slow
def test_evaluation_is_its_parts() -> None:
    logits, labels, w, units = data()
    result = whole()
    nll = -jax.nn.log_softmax(logits)[np.arange(N), labels]
    calibration = Calibration.from_batch(logits, labels, w)
    parts = {
        "nll": Mean.from_batch(nll, w),
        "perplexity": Perplexity.from_batch(nll, w),
        "bits_per_unit": BitsPer.from_batch(nll, units, w),
        "accuracy": Accuracy.from_batch(logits, labels, w),
        "top_k_accuracy": TopKAccuracy.from_batch(logits, labels, w),
        "brier": Brier.from_batch(logits, labels, w),
        "calibration_error": calibration,
    }
    for name, part in parts.items():
        close(getattr(result, name), part.compute(), err_msg=name)
    for a, b in zip(result.reliability, calibration.curve(), strict=True):
        close(a, b)
    assert Evaluation.from_batch(logits, labels, per_class=False).compute().brier is None


def test_reliability_curve() -> None:
    logits, labels, w, _ = data()
    curve = Calibration.from_batch(logits, labels, w, bins=4).curve()
    p = scipy.special.softmax(logits.astype(float), -1)
    assert curve.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    for b in range(4):
        inside = (p.max(-1) > b / 4) & (p.max(-1) <= (b + 1) / 4)
        close(curve.weight[b], w[inside].astype(float).sum())
        if inside.any():
            close(curve.confidence[b], np.average(p.max(-1)[inside], weights=w[inside]))
            close(curve.accuracy[b], np.average((p.argmax(-1) == labels)[inside], weights=w[inside]))
    # the bin of 1 is the last, and a boundary belongs to the bin below it
    sure = Calibration.from_batch(jnp.array([[1000.0, 0.0], [0.0, 0.0]]), jnp.array([0, 0]), bins=2)
    assert sure.curve().weight.tolist() == [1, 1]


def norms(confidence: Any, right: Any, w: Any, bins: int) -> dict[str, float]:
    """Calibration errors by their definitions, in float64; bins are (b/B, (b+1)/B]."""
    place = np.clip(np.ceil(confidence * bins) - 1, 0, bins - 1)
    inside = [place == b for b in range(bins) if w[place == b].sum() > 0]
    share = np.array([w[i].sum() for i in inside]) / w.sum()
    gap = np.array([abs(np.average(right[i] - confidence[i], weights=w[i])) for i in inside])
    return {"l1": share @ gap, "l2": math.sqrt(share @ gap**2), "max": gap.max()}


def test_norms_of_the_calibration_error() -> None:
    logits, labels, w, _ = data()
    calibration = Calibration.from_batch(logits, labels, w, bins=7)
    p = scipy.special.softmax(logits.astype(float), -1)
    expected = norms(p.max(-1), p.argmax(-1) == labels, w.astype(float), 7)
    for norm, value in expected.items():
        close(calibration.compute(norm), value, err_msg=norm)
    close(calibration.compute(), expected["l1"])
    assert all(Calibration.empty().compute(norm) == 0 for norm in expected)
    with pytest.raises(ValueError, match=r"^Calibration: norm must be one of \('l1', 'l2', 'max'\), got 'L1'"):
        calibration.compute("L1")


def test_ties_go_to_the_first_class() -> None:
    ties, labels = np.zeros((3, 3), "float32"), np.arange(3)
    for k, share in [(1, 1 / 3), (2, 2 / 3), (3, 1.0), (9, 1.0)]:
        close(TopKAccuracy.from_batch(ties, labels, k=k).compute(), share)
    close(Accuracy.from_batch(ties, labels).compute(), 1 / 3)


@pytest.mark.parametrize("classes", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (40, 4400))])
def test_rank_is_a_plain_count(classes: int) -> None:
    """Of equal logits the first comes first; infinite ones and the largest finite ones are told apart.

    A class that isn't there, its logit -inf or masked, is in no top k.
    """
    rng = np.random.default_rng(classes)
    most = np.finfo("float32").max
    few = np.array([-INF, -most, -1.5, -1, 0, 1e-30, 1, most, INF], "float32")
    logits = rng.choice(few[:-1], size=(64, classes))
    logits[::8] = rng.choice(few, size=(8, classes))
    logits[1::8] = rng.normal(size=(8, classes)).round(1)
    labels = rng.integers(classes, size=64).astype("int32")
    at_label = logits[np.arange(64), labels][:, None]
    before = (logits > at_label) | (logits == at_label) & (np.arange(classes) < labels[:, None])
    rank = before.sum(-1)
    there = at_label[:, 0] > -INF
    masked = rng.uniform(size=logits.shape) < 0.1
    for k in {1, *(rank[::20] + 1).tolist(), classes}:
        metric = TopKAccuracy.from_batch(logits, labels, k=k)
        assert float(metric.total.hi) == np.sum((rank < k) & there) and float(metric.weight.hi) == 64, k
        left = TopKAccuracy.from_batch(logits, labels, k=k, where=~masked)
        absent = TopKAccuracy.from_batch(np.where(masked, -INF, logits), labels, k=k)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, left, absent))
        assert float(left.total.hi) <= np.sum(there & ~masked[np.arange(64), labels])


@pytest.mark.parametrize("classes", [7, 40])
def test_a_label_does_not_come_before_itself(classes: int) -> None:
    """Though its logit, when it is computed again, be rounded otherwise."""
    x = np.linspace(1, 2, classes, dtype="float32")[None]
    block = Block(jnp.asarray(x), 0, jnp.asarray(np.arange(classes, dtype="int32")[None]), jnp.array([3]))
    rank = jax.jit(lambda label: _platforms.rank(lambda _: block, {"array": block.x}, label, x.dtype))
    for factor in (1 - 2e-7, 1, 1 + 2e-7):
        assert rank(x[:, 3] * np.float32(factor)).tolist() == [classes - 4]


@pytest.mark.parametrize("classes", [5, 40, 4400])
def test_brier_of_confident_rows_keeps_its_digits(classes: int) -> None:
    """1 - p is not formed from p: scores of 1e-32 are right, and those of sure and wrong rows just below 2."""
    gaps = np.repeat([0.0, 1.0, 8.0, 20.0, 36.0], 4)
    logits = -gaps[:, None] - np.arange(classes) % 5
    logits[:, 3] = 2.0  # below it all others are, by at least the gap
    logits[2::4, 0] = 2.0  # or the first attains it too
    labels = np.where(np.arange(20) % 4 == 3, 1, 3)
    x = logits - 2
    s = np.exp(x).sum(-1)
    rest = np.where(np.arange(classes) == labels[:, None], 0, np.exp(x))
    right = (rest.sum(-1) ** 2 + (rest**2).sum(-1)) / s**2
    for i in range(20):
        got = Brier.from_batch(logits[i : i + 1].astype("float32"), labels[i : i + 1].astype("int32")).compute()
        np.testing.assert_allclose(got, right[i], rtol=1e-6, err_msg=str(i))


@pytest.mark.parametrize("chunks", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_linear_logits(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product by blocks of classes, and of rows, with classes masked, has the numbers of the array that it stands for."""
    rng = np.random.default_rng(0)
    hidden, kernel = (jnp.asarray(rng.normal(size=shape), "float32") for shape in ((N, 6), (6, K)))
    _, labels, w, units = data()
    linear = jaxce.LinearLogits(hidden, kernel, block_size=None if chunks > 1 else 9)
    if chunks > 1:
        monkeypatch.setattr("jaxce._inputs.BLOCK", N * K // chunks)
    for where in (np.arange(N) % 5 > 0, np.arange(K)[None] != 3):
        got = Evaluation.from_batch(linear, labels, w, where, units=units).compute()
        x = np.where(where.reshape(-1, *where.shape[1:] or (1,)), hidden @ kernel, np.float32(-INF))
        whole = Evaluation.from_batch(x, labels, w, units=units).compute()
        same(got, whole)
        assert got.top_k_accuracy == whole.top_k_accuracy


def test_sharded_logits() -> None:
    logits, labels, w, units = data()
    logits[:, 3:30] = 1  # many ties

    def part(x: Any) -> Any:
        return Evaluation.from_batch(jaxce.ShardedLogits(x, axis_name="model"), labels, w, units=units).compute()

    whole = Evaluation.from_batch(logits, labels, w, units=units).compute()
    results = jax.jit(jax.vmap(part, axis_name="model"))(np.stack(np.split(logits, 4, -1)))
    for i in range(4):
        same(entry(results, i), whole)


def test_derivatives() -> None:
    """What is computed from a row's state has the derivatives of its definition."""
    logits, labels, w, _ = data(12)

    def brier(x: Any) -> Any:
        return jnp.average(jnp.sum((jax.nn.softmax(x) - jax.nn.one_hot(labels, K)) ** 2, -1), weights=w)

    def gap(x: Any) -> Any:  # with each example in a bin of its own
        right = (jnp.argmax(x, -1) == labels).astype("float32")
        return jnp.average(jnp.abs(right - jax.nn.softmax(x).max(-1)), weights=w)

    def ours(x: Any) -> Any:
        return Brier.from_batch(x, labels, w).compute(), Calibration.from_batch(x, labels, w, bins=10**5).compute()

    slopes = jax.jit(lambda x: (jax.jacobian(ours)(x), (jax.grad(brier)(x), jax.grad(gap)(x))))(logits)
    for got, right in zip(*slopes, strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-8)


def test_forward_mode() -> None:
    """Derivatives by many directions at once, of metrics of which some have none."""
    logits, labels, _, _ = data(12)

    def metrics(x: Any) -> Any:
        return Evaluation.from_batch(x, labels, k=2).compute(), TopKAccuracy.from_batch(x, labels, k=2).compute()

    forward, reverse = (jax.jit(mode(metrics))(logits) for mode in (jax.jacfwd, jax.jacrev))
    chex.assert_trees_all_close(forward, reverse, rtol=1e-5, atol=1e-8)


# --- yes or no --------------------------------------------------------------------------------------------------------


def questions(*shape: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(7)
    logits = (2 * rng.normal(size=shape)).astype("float32")
    labels = (rng.uniform(size=shape) < scipy.special.expit(0.5 * logits + 0.3)).astype("int32")
    return logits, labels, rng.uniform(0.1, 2, size=shape).astype("float32")


@pytest.mark.parametrize("shape", [pytest.param((90,), marks=pytest.mark.slow), (30, 4)])
def test_binary_sklearn(shape: tuple[int, ...]) -> None:
    """Of [N] and [N, K] logits; each entry of the latter is a question of its own."""
    logits, labels, w = questions(*shape)
    keep = np.arange(math.prod(shape)).reshape(shape) % 5 > 0
    dirty, bad = np.where(keep, logits, np.float32(NAN)), np.where(keep, labels, -100)
    result = BinaryEvaluation.from_batch(dirty, bad, w, keep, threshold=0.3).compute()
    p, y, weights = scipy.special.expit(logits.astype(float))[keep], labels[keep], w.astype(float)[keep]
    close(result.nll, sklearn.metrics.log_loss(y, p, sample_weight=weights, labels=[0, 1]))
    close(result.accuracy, sklearn.metrics.accuracy_score(y, p > 0.3, sample_weight=weights))
    close(result.brier, sklearn.metrics.brier_score_loss(y, p, sample_weight=weights))
    close(result.calibration_error, norms(p, y, weights, 15)["l1"])
    # its parts
    close(BinaryAccuracy.from_batch(dirty, bad, w, keep, threshold=0.3).compute(), result.accuracy)
    close(BinaryBrier.from_batch(dirty, bad, w, keep).compute(), result.brier)
    calibration = BinaryCalibration.from_batch(dirty, bad, w, keep)
    for norm, value in norms(p, y, weights, 15).items():
        close(calibration.compute(norm), value, err_msg=norm)
    # unweighted, the points of scikit-learn's curve
    curve = BinaryCalibration.from_batch(logits, labels, bins=5).curve()
    share, mean = sklearn.calibration.calibration_curve(
        labels.ravel(), scipy.special.expit(logits.astype(float)).ravel(), n_bins=5
    )
    some = np.asarray(curve.weight) > 0
    close(curve.accuracy[some], share)
    close(curve.confidence[some], mean)


def test_binary_batches_merge() -> None:
    batches = _, _, w = questions(3, 30)
    whole = BinaryEvaluation.from_batch(*batches).compute()
    assert isinstance(whole, BinaryEvaluationResult)
    end, _ = jax.jit(lambda b: jax.lax.scan(lambda m, b: (m.update(*b), None), BinaryEvaluation.empty(), b))(batches)
    same(end.compute(), whole)
    columns = w[:, :1] * np.ones((1, 30), "float32")
    same(
        BinaryEvaluation.from_batch(*batches[:2], w[:, :1]).compute(),
        BinaryEvaluation.from_batch(*batches[:2], columns).compute(),
    )


def test_binary_digits_and_edges() -> None:
    """A sure answer's Brier score isn't formed as 1 - p; invalid labels and NaN that count are seen; nothing is 0."""
    score = BinaryBrier.from_batch(jnp.array([30.0, -30.0]), jnp.array([True, False])).compute()
    np.testing.assert_allclose(score, scipy.special.expit(-30.0) ** 2, rtol=1e-6)
    slope = jax.vmap(jax.grad(lambda x: BinaryBrier.from_batch(x[None], jnp.array([1])).compute()))
    wrong = np.array([-18.0, -15, -12, -1], "float32")
    p, not_p = scipy.special.expit(wrong.astype(float)), scipy.special.expit(-wrong.astype(float))
    np.testing.assert_allclose(slope(jnp.asarray(wrong)), -2 * not_p**2 * p, rtol=1e-6)
    for logits, labels in (([0.0, NAN], [0, 1]), ([0.0, 1.0], [0, 2]), ([0.0, 1.0], [0, -1])):
        result = BinaryEvaluation.from_batch(jnp.array(logits), jnp.array(labels)).compute()
        assert all(jnp.isnan(x) for x in (result.nll, result.accuracy, result.brier, result.calibration_error))
    empty = BinaryEvaluation.empty().compute()
    assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(empty._replace(reliability=empty.reliability[1:])))
    half = BinaryAccuracy.from_batch(jnp.zeros(2), jnp.array([0, 1]))
    assert half.compute() == 0.5  # a probability of exactly the threshold is a no


# --- sums -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=16, max_size=16), st.integers(0, 9), st.permutations(range(4)))
def test_any_split_gives_the_same(owner: list[int], seed: int, order: list[int]) -> None:
    """Values of all sizes and signs, dealt out to four batches that are merged in any order, as a list and as a tree."""
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=16) * 10.0 ** rng.integers(-6, 7, size=16)).astype("float32")
    weights = rng.integers(1, 9, size=16).astype("float32")
    parts = [Mean.from_batch(values, weights, np.array(owner) == b) for b in order]
    merged = functools.reduce(Mean.merge, parts, Mean.empty())
    tree = parts[0].merge(parts[1]).merge(parts[2].merge(parts[3]))
    terms = [float(np.float32(v * w)) for v, w in zip(values, weights, strict=True)]  # a product is rounded once
    bound = 2.0**-44 * math.fsum(map(abs, terms))
    for metric in (merged, tree):
        assert abs(float(metric.total.hi) + float(metric.total.lo) - math.fsum(terms)) <= bound
        assert float(metric.weight.hi) == weights.sum()
    np.testing.assert_array_max_ulp(
        merged.compute(), tree.compute(), maxulp=1 if abs(math.fsum(terms)) > 1e-3 else 2**24
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2), min_size=N, max_size=N))
def test_any_split_gives_the_same_evaluation(owner: list[int]) -> None:
    logits, labels, w, units = data()
    parts = [Evaluation.from_batch(logits, labels, w, np.array(owner) == b, units=units) for b in range(3)]
    merged = functools.reduce(Evaluation.merge, parts, Evaluation.empty())
    for a, b in zip(jax.tree.leaves(merged.compute()), jax.tree.leaves(whole()), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-7, atol=1e-9)  # 2 ulp; a gap of a bin may be nearly 0


@pytest.mark.slow
def test_batches_of_any_size() -> None:
    """Losses too are of other batches' shapes here: a few ulp of each."""
    logits, labels, w, units = data()
    metric = Evaluation.empty()
    for start in range(0, N, 24):
        cut = slice(start, start + 24)
        metric = metric.update(logits[cut], labels[cut], w[cut], units=units[cut])
    same(metric.compute(), whole())


def test_counts_are_exact_beyond_2_to_the_24() -> None:
    start = Mean(Sum(jnp.float32(2**24), jnp.float32(0)), Sum(jnp.float32(2**24), jnp.float32(0)))

    def step(metric: Mean, _: Any) -> tuple[Mean, None]:
        return metric.update(jnp.ones(3)), None

    end, _ = jax.jit(lambda m: jax.lax.scan(step, m, length=1001))(start)
    assert float(end.weight.hi) + float(end.weight.lo) == 2**24 + 3003
    assert float(end.total.hi) + float(end.total.lo) == 2**24 + 3003
    assert_same(end.compute(), 1)
    large = functools.reduce(Mean.merge, [end] * 7)  # 1.2e8
    assert float(large.weight.hi) + float(large.weight.lo) == 7 * (2**24 + 3003)


def test_a_long_stream_keeps_its_digits() -> None:
    """10^5 batches of 0.1: a plain float32 sum would be off by far more."""

    def step(metric: Mean, _: Any) -> tuple[Mean, None]:
        return metric.update(jnp.full(1, 0.1)), None

    end, _ = jax.jit(lambda m: jax.lax.scan(step, m, length=100_000))(Mean.empty())
    assert_same(end.compute(), np.float32(0.1))
    plain, _ = jax.jit(lambda x: jax.lax.scan(lambda c, _: (c + np.float32(0.1), None), x, length=100_000))(
        jnp.float32(0)
    )
    assert abs(float(plain) / 1e5 - 0.1) > 1e-5


# --- what is left out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["where", "weights"])
def test_padding_leaves_no_trace(by: str) -> None:
    logits, labels, w, units = data()
    keep = np.arange(N) % 3 > 0
    dirty = np.where(keep[:, None], logits, np.array([NAN, INF, -INF] + [NAN] * (K - 3), "float32"))
    bad_labels = np.where(keep, labels, -100)
    if by == "where":
        got = Evaluation.from_batch(dirty, bad_labels, np.where(keep, w, np.float32(NAN)), keep, units=units)
    else:
        got = Evaluation.from_batch(dirty, bad_labels, np.where(keep, w, np.float32(0)), units=units)
    expected = exact(logits[keep], labels[keep], w[keep], units[keep])
    for name, value in expected.items():
        close(getattr(got.compute(), name), value, err_msg=name)


def test_a_mask_of_entries() -> None:
    """Masked classes are as those of logit -inf, and a row with none left takes no part."""
    logits, labels, w, units = data()
    mask = np.random.default_rng(1).uniform(size=logits.shape) < 0.7
    mask[np.arange(N), labels] = True
    mask[5] = False
    keep = np.arange(N) != 5
    got = Evaluation.from_batch(logits, labels, w, mask, units=units).compute()
    x = np.where(mask, logits, np.float32(-INF))
    same(got, Evaluation.from_batch(x[keep], labels[keep], w[keep], units=units[keep]).compute())
    same(got, Evaluation.from_batch(x, labels, w, units=units).compute())
    same(
        Accuracy.from_batch(logits, labels, w, mask[:1] | (np.arange(K) < 30)).compute(),
        Accuracy.from_batch(np.where(mask[:1] | (np.arange(K) < 30), logits, -np.float32(INF)), labels, w).compute(),
    )


@pytest.mark.parametrize("bad", ["label", "logit"])
def test_what_is_wrong_and_counts_is_seen(bad: str) -> None:
    logits, labels, w, units = data()
    if bad == "label":
        labels[5] = K
    else:
        logits[5, 2] = NAN
    result = Evaluation.from_batch(logits, labels, w, units=units).compute()
    for name in ("nll", "accuracy", "top_k_accuracy", "brier", "calibration_error"):
        assert jnp.isnan(getattr(result, name)), name


def test_an_infinite_loss_is_infinite() -> None:
    """-inf at the label: nothing becomes NaN, and merging doesn't either."""
    one = Evaluation.from_batch(jnp.array([[-INF, 0.0], [0.0, 1.0]]), jnp.array([0, 0]))
    result = one.merge(one).merge(Evaluation.empty()).compute()
    assert result.nll == INF and result.perplexity == INF and result.bits_per_unit == INF
    assert BitsPer.from_batch(jnp.ones(2), jnp.zeros(2)).compute() == INF and BitsPer.empty().compute() == 0
    assert result.accuracy == 0 and not jnp.isnan(result.calibration_error) and result.brier > 1


def test_nothing_has_documented_values() -> None:
    logits, labels, *_ = data(4)
    nothing = EvaluationResult(0.0, 1.0, 0.0, 0.0, 0.0, None, 0.0, 0.0)  # type: ignore[arg-type]
    with jax.debug_nans(True):
        for empty in (
            Evaluation.empty(),
            Evaluation.empty().merge(Evaluation.empty()),
            Evaluation.from_batch(logits, labels, where=np.zeros(4, bool)),
            Evaluation.from_batch(np.zeros((0, K), "float32"), np.zeros(0, "int32")),
        ):
            result = empty.compute()
            assert all(jnp.all(leaf == 0) for leaf in result.reliability[1:])
            assert result._replace(reliability=None) == nothing  # type: ignore[arg-type]


# --- transformations --------------------------------------------------------------------------------------------------


def entry(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[i], tree)


def same(a: Any, b: Any) -> None:
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-8)


def test_scan() -> None:
    logits, labels, w, _ = data()
    batches = [a.reshape(8, 12, *a.shape[1:]) for a in (logits, labels, w)]  # one unit each

    @jax.jit
    def evaluate(batches: Any) -> Any:
        end, _ = jax.lax.scan(lambda m, b: (m.update(*b), None), Evaluation.empty(), batches)
        return end.compute()

    same(evaluate(batches)._replace(bits_per_unit=0.0), whole()._replace(bits_per_unit=0.0))


@pytest.mark.parametrize(
    "empty",
    [*(pytest.param(m.empty, marks=pytest.mark.slow) for m in (Mean, TopKAccuracy, Calibration)), Evaluation.empty],
)
def test_a_metric_can_be_donated(empty: Any) -> None:
    """No array is in it twice, at the start or after an update."""
    logits, labels, *_ = data(4)
    batch = (jnp.ones(4),) if empty == Mean.empty else (jnp.asarray(logits), jnp.asarray(labels))
    step = jax.jit(lambda metric, *batch: metric.update(*batch), donate_argnums=0)
    metric, plain = empty(), empty()
    for _ in range(3):
        metric, plain = step(metric, *batch), plain.update(*batch)
    same(step(plain.update(*batch), *batch).compute(), step(step(metric, *batch), *batch).compute())


def test_vmap_over_models() -> None:
    logits, labels, w, units = data()
    models = np.stack([logits, 2 * logits, -logits])

    @jax.jit
    @jax.vmap
    def once_and_twice(x: Any) -> Any:
        metric = Evaluation.from_batch(x, labels, w, units=units)
        return metric.compute(), metric.merge(metric).compute()

    once, twice = once_and_twice(models)
    same(twice.nll, once.nll)
    for i in range(3):
        same(entry(once, i), Evaluation.from_batch(models[i], labels, w, units=units).compute())


def test_sum_over_an_axis() -> None:
    """Unevenly weighted parts, and the sum of the pairs is as exact as one."""
    logits, labels, w, units = data()
    w[:12] = 0  # a part without anything
    parts = [a.reshape(8, 12, *a.shape[1:]) for a in (logits, labels, w, units)]

    def evaluate(x: Any, y: Any, w: Any, units: Any) -> Any:
        return Evaluation.from_batch(x, y, w, units=units).psum("data")

    metrics = jax.jit(jax.vmap(evaluate, axis_name="data"))(*parts)
    whole = Evaluation.from_batch(logits, labels, w, units=units).compute()
    for i in (0, 7):
        same(entry(metrics, i).compute(), whole)

    def total(axes: Any) -> Any:
        return lambda v: Mean.from_batch(v).psum(axes).total

    values = np.array([2.0**24, 1.0, 1.0, 1.0, -1e-3, 2.0**30], "float32")
    one = jax.jit(jax.vmap(total("data"), axis_name="data"))(values)
    assert float(one.hi[0]) + float(one.lo[0]) == 2.0**30 + 2**24 + 3 - float(np.float32(1e-3))
    # two axes at once
    two = jax.jit(jax.vmap(jax.vmap(total(("a", "b")), axis_name="b"), axis_name="a"))(values.reshape(2, 3))
    assert two.hi[0, 0] == one.hi[0] and two.lo[1, 2] == one.lo[0]


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_shard_map(check_vma: bool) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=check_vma)
    def evaluate(*batch: Any) -> Any:
        return Evaluation.from_batch(*batch).psum("data").compute()

    same(jax.jit(evaluate)(*data()[:3])._replace(bits_per_unit=0.0), whole()._replace(bits_per_unit=0.0))


@pytest.mark.slow
def test_float64_and_half() -> None:
    logits, labels, *_ = data()
    with jax.enable_x64(True):
        both = Mean.empty().update(jnp.array([1.0, 2.5], "float64"))  # of two dtypes: the wider
        assert both.compute() == 1.75 and both.compute().dtype == "float64"
        metric = Evaluation.empty(dtype=jnp.float64).update(logits.astype("float64"), labels)
        assert all(leaf.dtype == "float64" for leaf in jax.tree.leaves(metric))
        expected = exact(logits, labels, np.ones(N), 1)
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(metric.compute(), name), value, rtol=1e-13, err_msg=name)
    half = Evaluation.empty().update(jnp.asarray(logits, "bfloat16"), labels)
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(half.compute()))


# --- other libraries' loops -------------------------------------------------------------------------------------------


def test_a_metric_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Mean.empty().total = None  # type: ignore[misc]


def test_flax_nnx() -> None:
    """The line that the module's docstring shows."""
    nnx = pytest.importorskip("flax.nnx")
    logits, labels, *_ = data()
    metric = nnx.Variable(Evaluation.empty())
    metric.set_value(metric.get_value().update(logits, labels))
    same(metric.get_value().compute(), Evaluation.from_batch(logits, labels).compute())


@pytest.mark.slow
def test_clu_loop() -> None:
    """clu's protocol, functional: None at first, then merge."""
    logits, labels, *_ = data()
    metrics = None
    for cut in (slice(0, 48), slice(48, N)):
        update = Evaluation.from_batch(logits[cut], labels[cut])
        metrics = update if metrics is None else metrics.merge(update)
    assert metrics is not None
    same(metrics.compute(), Evaluation.from_batch(logits, labels).compute())


# --- errors -----------------------------------------------------------------------------------------------------------

X, Y = jnp.zeros((4, 3)), jnp.zeros(4, "int32")
BAD = [
    (lambda: Mean.from_batch(Y), TypeError, "Mean: values must be"),
    (lambda: Mean.from_batch(X, jnp.ones(3)), ValueError, "Mean: weights must have"),
    (lambda: Mean.from_batch(X, None, jnp.ones((4, 3))), TypeError, "Mean: where must be"),
    (lambda: BitsPer.from_batch(X, jnp.ones(3)), ValueError, "BitsPer: units must have"),
    (lambda: Accuracy.from_batch(X, Y, jnp.ones((4, 3))), ValueError, "Accuracy: weights must have"),
    (lambda: Accuracy.from_batch(X, Y, where=jnp.ones((2, 3), bool)), ValueError, "Accuracy: where must have"),
    (lambda: Accuracy.from_batch(X, Y[:2]), ValueError, "Accuracy: labels must have"),
    (lambda: TopKAccuracy.from_batch(X, Y, k=0), ValueError, "TopKAccuracy: k must be a positive integer, got 0"),
    (lambda: Calibration.empty(bins=2.5), ValueError, "Calibration: bins must be a positive integer, got 2.5"),  # type: ignore[arg-type]
    (lambda: Perplexity.from_batch(Y), TypeError, "Perplexity: nll must be"),
    (lambda: Perplexity.from_batch(X, jnp.ones(3)), ValueError, "Perplexity: weights must have"),
    (lambda: BinaryAccuracy.from_batch(X, Y), ValueError, "BinaryAccuracy: labels must have the shape of the logits"),
    (
        lambda: BinaryAccuracy.from_batch(X, X.T),
        ValueError,
        r".* got float32\[3,4\]; give labels\.reshape\(\(4, 3\)\)$",
    ),
    (lambda: BinaryBrier.from_batch(X, X, Y), ValueError, "BinaryBrier: weights must have"),
    (lambda: BinaryBrier.from_batch(X, X, where=Y != 0), ValueError, "BinaryBrier: where must have as many axes"),
    (lambda: BinaryAccuracy.empty(threshold=1), ValueError, r"BinaryAccuracy: threshold must be a number in \(0, 1\)"),
    (lambda: BinaryCalibration.empty(bins=0), ValueError, "BinaryCalibration: bins must be a positive integer, got 0"),
    (lambda: Evaluation.empty(k="a"), TypeError, "Evaluation: k must be a positive integer, got 'a'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        call()


EMPTY: list[Any] = [getattr(jaxce.metrics, name) for name in jaxce.metrics.__all__]
EMPTY = [metric for metric in EMPTY if hasattr(metric, "from_batch") and metric is not jaxce.metrics.Metric]


@pytest.mark.parametrize("metric", EMPTY)
def test_calls_of_other_libraries(metric: Any) -> None:
    """Errors name the metric, show its own arguments, and hint at no argument that it lacks."""
    name, batch = metric.__name__, inspect.signature(metric.from_batch).parameters
    for call in (metric, lambda: metric(X, Y), lambda: metric(num_classes=3)):
        with pytest.raises(
            TypeError, match=rf"^{name}: a metric must be made by {name}\.empty\(\) or {name}\.from_batch"
        ):
            call()
    for method in (metric.from_batch, metric.empty().update):
        first = [*batch][0]
        with pytest.raises(TypeError, match=rf"^{name}: missing argument '{first}'; write {name}\.\w+\({first}"):
            method()
        for other in ("mask", "sample_weight", "y_true", "num_classes", "nonsense"):
            with pytest.raises(TypeError, match=rf"^{name}: unexpected keyword '{other}'") as error:
                method(*[X] * 2, **{other: 1})
            hints = re.findall(r"(\w+)=", str(error.value))
            assert set(hints) <= set(inspect.signature(method).parameters)
    with pytest.raises(TypeError, match=rf"^{name}: unexpected keyword 'mask'; give where=, True for what takes part$"):
        metric.empty().update(X, Y, mask=Y)
    with pytest.raises(TypeError, match=rf"^{name}: other must be of the class {name}, got ndarray"):
        metric.empty().merge(np.zeros(3))


def test_metrics_of_other_options_do_not_merge() -> None:
    pairs = [
        (Evaluation.empty(k=2), Evaluation.empty(k=3)),
        (Evaluation.empty(bins=2), Evaluation.empty(bins=3)),
        (TopKAccuracy.empty(k=2), TopKAccuracy.empty()),
        (Calibration.empty(bins=2), Calibration.empty()),
        (BinaryAccuracy.empty(threshold=0.4), BinaryAccuracy.empty()),
        (BinaryEvaluation.empty(threshold=0.4), BinaryEvaluation.empty()),
    ]
    for one, other in pairs:
        with pytest.raises(
            ValueError, match=f"^{type(one).__name__}: other must have the same options, {{.*}}, got {{"
        ):
            one.merge(other)


@pytest.mark.parametrize("metric", EMPTY)
def test_a_metric_can_be_copied_and_pickled(metric: Any) -> None:
    empty = metric.empty()
    for other in (
        copy.copy(empty),
        copy.deepcopy(empty),
        pickle.loads(pickle.dumps(empty)),
        dataclasses.replace(empty),
    ):
        assert type(other) is metric and jax.tree.structure(other) == jax.tree.structure(empty)
        same(other, empty)


def test_trees_of_different_metrics_are_different() -> None:
    """To JAX those of dataclasses with the same fields are equal, and a compiled function may return the other class."""
    kinds = [
        kind
        for kind in vars(jaxce.metrics).values()
        if inspect.isclass(kind) and issubclass(kind, jaxce.metrics.Metric)
    ]
    trees = [
        jax.tree.structure(kind.empty())
        for kind in kinds
        if kind.__name__ in jaxce.metrics.__all__ and kind is not jaxce.metrics.Metric
    ]
    assert len(trees) > 10
    assert all(a != b for i, a in enumerate(trees) for b in trees[:i])


def test_psum_under_x64() -> None:
    with jax.enable_x64(True):
        means = jax.vmap(lambda x: Mean.from_batch(x).psum("i").compute(), axis_name="i")(jnp.ones((2, 3)))
    np.testing.assert_array_equal(means, [1, 1])
