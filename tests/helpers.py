"""What the tests measure against: exact rows in mpmath, errors in ulp, plain definitions in NumPy, and nasty logits.

Three layers, each independent of the library:

- `Row` is one row of logits taken exactly as the binary numbers it holds, with everything that the softmax losses are
  made of in 60 digits. `ulp_error` says how many units in the last place a result is from such a number.
- `plain_*` are the definitions in float64, one row at a time, where a masked class is simply deleted. They say what the
  functions mean (axes, masks, modifiers) and not how exact they are.
- `families` are the logits on which losses usually go wrong.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np

mpmath.mp.dps = 60
ZERO, INF = mpmath.mpf(0), mpmath.inf
FLOATS = ("float32", "float64", "bfloat16", "float16")


# --- exact rows -------------------------------------------------------------------------------------------------------


BITS = 256


@functools.cache
def _whole(n: int) -> Any:
    return mpmath.exp(-n)


@functools.cache
def _digit(place: int, digit: int) -> int:
    """exp(-digit / 256^place) in fixed point."""
    return int(mpmath.floor(mpmath.ldexp(mpmath.exp(-mpmath.ldexp(mpmath.mpf(digit), -8 * place)), BITS)))


def exp_minus(gap: Any) -> Any:
    """exp(-gap) to 60 digits for gap >= 0, as `mpmath.exp` has it but six times as fast: rows can be 131072 long.

    The whole part and four 8-bit digits of the gap are looked up, what is left is below 2^-32 and a short series.
    """
    one = 1 << BITS
    fixed = mpmath.libmp.to_fixed(gap._mpf_, BITS)
    left = fixed & (one - 1)
    value = one
    for place in (1, 2, 3, 4):
        shift = BITS - 8 * place
        value = value * _digit(place, left >> shift) >> BITS
        left &= (1 << shift) - 1
    series = one
    for k in range(8, 0, -1):
        series = one - (left * series >> BITS) // k
    return _whole(fixed >> BITS) * mpmath.ldexp(mpmath.mpf(value * series >> BITS), -BITS)


class Row:
    """One row of logits in 60 digits: maximum, gaps, exp(-gap), and their sum without one of the maxima."""

    def __init__(self, logits: Sequence[float]) -> None:
        """Take the logits as they are: exact binary numbers, -inf for a class that isn't there."""
        self.top = max(range(len(logits)), key=logits.__getitem__)
        self.maximum = mpmath.mpf(logits[self.top])
        self.gaps = [INF if x == -math.inf else self.maximum - mpmath.mpf(x) for x in logits]
        self.exps = [exp_minus(g) if g < 800 else ZERO for g in self.gaps]  # exp(-800) is below every normal number
        self.rest = mpmath.fsum(self.exps[: self.top] + self.exps[self.top + 1 :])
        self.total = 1 + self.rest
        self.log_total = mpmath.log1p(self.rest)

    @property
    def logsumexp(self) -> Any:
        return self.maximum + self.log_total

    def nll(self, k: int) -> Any:
        return self.gaps[k] + self.log_total

    @functools.cached_property
    def probabilities(self) -> list[Any]:
        return [e / self.total if e else ZERO for e in self.exps]

    def p(self, k: int) -> Any:
        return self.probabilities[k]

    def not_p(self, k: int) -> Any:
        """1 - p, without cancellation: only the top class can be so likely that it would cancel."""
        return self.rest / self.total if k == self.top else 1 - self.probabilities[k]

    @functools.cached_property
    def mean_gap(self) -> Any:
        return mpmath.fsum(e * g for e, g in zip(self.exps, self.gaps, strict=True) if e) / self.total

    @property
    def entropy(self) -> Any:
        return self.mean_gap + self.log_total


@functools.cache
def _row(data: bytes) -> Row:
    return Row(np.frombuffer(data, np.float64).tolist())


def rows(logits: Any) -> list[Row]:
    """An exact `Row` for each row of a [N, K] array; the same row is computed once in the whole run of the tests."""
    return [_row(row.tobytes()) for row in np.asarray(logits).astype(np.float64)]


def _pair(exact: Any) -> tuple[float, float]:
    """The exact number as an unevaluated sum of two float64s: 106 bits, enough to measure float64 to 1e-15 ulp."""
    high = float(exact)
    return high, float(exact - high) if math.isfinite(high) else 0.0


def ulp_error(got: Any, exact: Any, scale: Any = None) -> np.ndarray:
    """|got - exact| in units in the last place of ``scale`` (else of exact) in got's dtype.

    Where that unit would be subnormal, the result only has to stay below the smallest normal number, since XLA flushes to
    zero; where the exact result is beyond the largest finite number, it has to be the infinity of that sign. Anything
    else, NaN among it, is an error of infinitely many ulp.
    """
    got = np.asarray(got)
    info = jnp.finfo(got.dtype)
    flat = got.astype(np.float64).reshape(-1)
    if got.dtype == "float64":
        highs, lows = np.array([_pair(e) for e in exact]).reshape(-1, 2).T
    else:  # a float64 is exact to 2^-29 ulp
        highs, lows = np.array([float(e) for e in exact]), np.zeros(len(exact))
    scales = np.abs(highs if scale is None else np.array([float(s) for s in scale]))
    assert flat.shape == highs.shape == scales.shape
    with np.errstate(invalid="ignore", over="ignore"):
        unit = np.ldexp(1.0, np.maximum(np.frexp(scales)[1] - 1 - info.nmant, -1074))
        error = np.abs((flat - highs) - lows) / unit
        small = scales < float(info.tiny)
        error = np.where(small, np.where(np.abs(flat - highs) <= 1.01 * float(info.tiny), 0.0, np.inf), error)
        large = np.abs(highs) > float(info.max)
        same = np.isinf(flat) & (np.sign(flat) == np.sign(highs))
        near = np.abs(flat) >= float(info.max) * (1 - 8 * float(info.eps))  # the rounding to infinity isn't at stake
        error = np.where(large, np.where(same | near & (np.abs(highs) < float(info.max) * 1.01), 0.0, np.inf), error)
    return np.where(np.isnan(error), np.inf, error).reshape(got.shape)


ON_A_CPU = jax.default_backend() == "cpu"


def assert_same(got: Any, expected: Any) -> None:
    """Equal, to the last bit on a CPU. A GPU's quotients aren't the nearest numbers, and it rounds two programs of one
    formula each in its own way: 2 ulp."""
    np.testing.assert_allclose(got, expected, rtol=0 if ON_A_CPU else 2.4e-7)


def vanishing_error(got: Any, exact: Any) -> np.ndarray:
    """The error, 0 or infinite, of what a probability below the smallest normal number is multiplied with.

    On a CPU that is 0. A GPU has such numbers, with fewer digits the smaller they are.
    """
    got = np.asarray(got)
    most = 1.01 * float(jnp.finfo(got.dtype).tiny)
    size = np.abs(np.array([float(e) for e in exact])).reshape(got.shape)
    return np.where(np.abs(got.astype(np.float64)) <= (most if ON_A_CPU else np.maximum(most, 1.5 * size)), 0, np.inf)


def contract(sizes: Any, nats: Any = None) -> np.ndarray:
    """How many ulp losses and gradients of these sizes may be off.

    4, and half an eps for each nat that the deciding classes lie below the maximum, which is -log of the size if
    nothing else is said: a gap g is rounded by up to half an ulp of g, which exp turns into a relative error of eps g /
    2.
    """
    sizes = np.abs([float(n) for n in sizes])
    if nats is None:
        with np.errstate(divide="ignore"):
            nats = np.clip(-np.log(sizes), 0, 800)
    eps = np.frexp(np.where(np.isfinite(sizes), sizes, 1))[0] * 2  # in ulp of the size: 1 to 2
    return 4 + np.asarray(nats, np.float64) / 2 * eps


def worst(errors: np.ndarray, names: Sequence[str], limits: Any) -> list[str]:
    """One line for each family with an error above its limit, for assertion messages: nothing when all is well."""
    errors = np.nan_to_num(errors.reshape(len(names), -1), nan=np.inf)
    ratios = errors / np.broadcast_to(limits, errors.size).reshape(errors.shape)
    worst_of: dict[str, tuple[float, float]] = {}
    for name, error, ratio in zip(names, errors, ratios, strict=True):
        i = int(ratio.argmax())
        worst_of[name] = max(worst_of.get(name, (0.0, 0.0)), (float(ratio[i]), float(error[i])))
    return [
        f"{name}: {error:.3g} ulp, {ratio:.3g} of its limit" for name, (ratio, error) in worst_of.items() if ratio > 1
    ]


# Compiles in a third to half of the time: for results whose numbers matter, not their speed.
FEWER_STEPS: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 11):  # later ones have no loops but those lowered through MLIR
    FEWER_STEPS["xla_cpu_use_fusion_emitters"] = False
quick = functools.partial(jax.jit, compiler_options=FEWER_STEPS)


def gradient_and_hessian(function: Callable[..., Any], *inputs: Any) -> tuple[Any, Any]:
    """By all inputs; the Hessian's first axis is that of all entries of these. It is made of its products with unit
    vectors: their program is compiled in less than half of the time that one for the whole Hessian takes."""
    slopes = jax.grad(function, tuple(range(len(inputs))))
    product = quick(lambda inputs, direction: jax.jvp(slopes, inputs, direction))
    leaves, tree = jax.tree.flatten(inputs)
    ends = np.cumsum([v.size for v in leaves])
    found = [
        product(inputs, tree.unflatten(d.reshape(v.shape).astype(v.dtype) for d, v in zip(parts, leaves, strict=True)))
        for parts in (np.split(row, ends[:-1]) for row in np.eye(ends[-1]))
    ]
    return found[0][0], jax.tree.map(lambda *columns: np.stack(columns), *(column for _, column in found))


# --- nasty logits -----------------------------------------------------------------------------------------------------


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round to the dtype, staying finite where the values were."""
    info = jnp.finfo(dtype)
    top = float(info.max)
    return np.where(np.isinf(values), values, np.clip(values, -top, top)).astype(info.dtype)


def families(dtype: str, classes: int, count: int = 4) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Family names, logits [N, classes] and integer labels [N]: ``count`` rows of each family, stacked."""
    rng = np.random.default_rng(classes)
    info = jnp.finfo(dtype)
    names: list[str] = []
    logits: list[np.ndarray] = []
    labels: list[int] = []

    def add(name: str, row: np.ndarray, label: int) -> None:
        names.append(name)
        logits.append(cast(row, dtype))
        labels.append(label)

    def somewhere() -> int:
        return int(rng.integers(classes))

    def confident(loss: float) -> tuple[np.ndarray, int]:
        """A row whose top class has about this loss."""
        row = rng.normal(size=classes) + math.log(loss / (classes - 1))
        top = somewhere()
        row[top] = 0.0
        return row, top

    for i in range(count):
        normal = rng.normal(size=classes)
        add("random", 3 * normal, somewhere())
        add("nearly equal", 1 + normal * 4 * float(info.eps), somewhere())
        add("very negative", 3 * normal - 1000, somewhere())
        for offset in (1e4, -1e4, 1e20, 3e38, -3e38):
            add(f"offset {offset:g}", normal * max(3.0, abs(offset) * 2 * float(info.eps)) + offset, somewhere())
        add("spread 80", 80 * rng.uniform(-1, 1, classes), somewhere())
        add("spread 1e4", 1e4 * normal, somewhere())
        for loss in (1e-3, 1e-7, 1e-12, 1e-20, 1e-30)[i % 2 :: 2]:
            row, top = confident(loss)
            add(f"right, {loss:g}", row + 7 * (i // 2), top)
            row, top = confident(loss)
            add(f"wrong, {loss:g}", row - 5, (top + 1) % classes)
        ties = np.where(rng.uniform(size=classes) < 0.5, 2.5, 2.5 - rng.exponential(10, classes))
        add("ties", ties, int(ties.argmax()))
        part = np.where(rng.uniform(size=classes) < 0.4, -np.inf, 3 * normal)
        label = somewhere()
        part[label] = rng.normal()
        add("-inf classes", part, label)
    add("all equal", np.full(classes, -3.75), somewhere())
    add("all zero", np.zeros(classes), somewhere())
    one = np.full(classes, -np.inf)
    one[-1] = 4.5
    add("one class left", one, classes - 1)
    add("label at -inf", one, 0)
    # A logsumexp near 0, where m and L nearly cancel unless they are added with care.
    add("logsumexp near 0", rng.normal(size=classes) * 1e-3 - math.log(classes), somewhere())
    return names, np.stack(logits), np.array(labels, np.int32)


def soft_labels(names: Sequence[str], logits: np.ndarray, labels: np.ndarray, dtype: str) -> np.ndarray:
    """Rows of probabilities with zeros among them: one-hot, half of the classes, nearly the prediction, in turn."""
    rng = np.random.default_rng(logits.shape[1])
    result = np.zeros(logits.shape)
    for i, row in enumerate(logits.astype(np.float64)):
        if i % 3 == 0 or names[i] == "label at -inf":
            result[i, labels[i]] = 1.0
        elif i % 3 == 1:
            weights = rng.exponential(size=row.size) * (rng.uniform(size=row.size) < 0.5) * np.isfinite(row)
            weights[labels[i]] += 0.1
            result[i] = weights / weights.sum()
        else:
            exps = np.exp(row - row.max())
            result[i] = exps / exps.sum()
    tiny = float(jnp.finfo(dtype).tiny)
    return cast(np.where(result < tiny, 0.0, result), dtype)


# --- plain definitions ------------------------------------------------------------------------------------------------


def by_rows(
    row_function: Callable[..., Any],
    logits: Any,
    labels: Any,
    axis: Any = -1,
    where: Any = None,
    empty: Any = 0.0,
) -> np.ndarray:
    """Apply ``row_function(logits, labels, keep)`` to every row; ``empty`` for the rows of which nothing is left.

    Labels are rows of their own when they have the logits' shape and one integer per row otherwise.
    """
    logits = np.asarray(logits, np.float64)
    axes = tuple(a % logits.ndim for a in (axis if isinstance(axis, tuple) else (axis,)))
    batch = tuple(a for a in range(logits.ndim) if a not in axes)
    shape = tuple(logits.shape[a] for a in batch)

    def flat(array: np.ndarray) -> np.ndarray:
        return array.transpose(batch + axes).reshape(*shape, -1)

    labels = np.asarray(labels)
    labels = flat(labels) if labels.shape == logits.shape else labels
    keep = np.ones(logits.shape, bool) if where is None else np.asarray(where)
    if keep.shape == shape and where is not None:
        keep = np.broadcast_to(np.expand_dims(keep, axes), logits.shape)
    keep = flat(np.broadcast_to(keep, logits.shape))
    logits = flat(logits)
    result = np.zeros(shape)
    for i in np.ndindex(*shape):
        result[i] = row_function(logits[i], labels[i], keep[i]) if keep[i].any() else empty
    return result


def plain_log_softmax(x: np.ndarray) -> np.ndarray:
    """One row."""
    m = x.max()
    return x - m - np.log(np.exp(x - m).sum())


def plain_logsumexp(x: np.ndarray) -> float:
    """One row."""
    return float(x.max() + np.log(np.exp(x - x.max()).sum()))


def plain_terms(x: np.ndarray, label: Any, keep: np.ndarray, smoothing: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Target probabilities and log-probabilities of one row, masked classes deleted."""
    target = np.asarray(label, np.float64) if np.ndim(label) else np.eye(x.size)[int(label)]
    target = np.where(keep, target, 0.0)[keep] if np.ndim(label) else target[keep]
    target = (1 - smoothing) * target + smoothing / keep.sum()
    return target, plain_log_softmax(x[keep])


def plain_softmax_cross_entropy(
    logits: Any,
    labels: Any,
    axis: Any = -1,
    where: Any = None,
    *,
    label_smoothing: float = 0.0,
    class_weights: Any = None,
    z_loss: float = 0.0,
) -> np.ndarray:
    """The sum over classes of weight * target * -log softmax, plus z_loss * logsumexp^2; integer or dense labels."""

    def row(x: np.ndarray, label: Any, keep: np.ndarray) -> float:
        if not np.ndim(label) and not keep[int(label)]:
            return math.inf
        target, log_p = plain_terms(x, label, keep, label_smoothing)
        weights = np.ones(x.size) if class_weights is None else np.asarray(class_weights, np.float64)
        with np.errstate(invalid="ignore"):
            terms = np.where(target == 0, 0.0, -target * weights[keep] * log_p)
        return float(terms.sum() + z_loss * plain_logsumexp(x[keep]) ** 2)

    return by_rows(row, logits, labels, axis, where)


def plain_softmax_focal_loss(
    logits: Any, labels: Any, axis: Any = -1, where: Any = None, *, gamma: float = 2.0
) -> np.ndarray:
    """The sum over classes of target * (1 - p)^gamma * -log p."""

    def row(x: np.ndarray, label: Any, keep: np.ndarray) -> float:
        target, log_p = plain_terms(x, label, keep)
        return float(-(target * (-np.expm1(log_p)) ** gamma * log_p).sum())

    return by_rows(row, logits, labels, axis, where)


def plain_poly_loss_cross_entropy(
    logits: Any, labels: Any, *, epsilon: float = 2.0, axis: Any = -1, where: Any = None
) -> np.ndarray:
    """Cross-entropy + epsilon * the sum over classes of target * (1 - p)."""

    def row(x: np.ndarray, label: Any, keep: np.ndarray) -> float:
        target, log_p = plain_terms(x, label, keep)
        return float((target * (-log_p - epsilon * np.expm1(log_p))).sum())

    return by_rows(row, logits, labels, axis, where)


def plain_entropy_with_logits(logits: Any, axis: Any = -1, where: Any = None) -> np.ndarray:
    """The sum over classes of -p log p."""

    def row(x: np.ndarray, _: Any, keep: np.ndarray) -> float:
        log_p = plain_log_softmax(x[keep])
        return float(-(np.exp(log_p) * np.where(np.isinf(log_p), 0.0, log_p)).sum())

    return by_rows(row, logits, logits, axis, where)
