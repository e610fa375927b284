r"""Binary losses on logits: how surprising is a yes or a no to someone whose log-odds for yes are x?

Everything is measured from |x|, with exp(-|x|) <= 1, and p = sigma(x) appears only as one of a pair (p, 1 - p) of which
neither is formed from the other. So no tail is lost: not the loss's, not its gradient's, not its curvature's.

The plain loss is written without a comparison, as XLA:CPU then makes a single loop of the loss and the mean over it; one
``jnp.where`` makes that two to four loops with the whole array between them, and four times the time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxce import _checks, _platforms
from jaxce._checks import NOT_NEGATIVE, SHARE, SHARES, ArrayLike, compiled
from jaxce._rules import custom_jvp, largest, product, smallest
from jaxce._terms import ATANH, fitted, log1p, neg_log, polynomial, ratio

_ATANH = {4: fitted(ATANH, 4, 0, 1 / 9), 8: fitted(ATANH, 10, 0, 1 / 9)}


def _log1p_exp(x: Array) -> Array:
    """log(1 + exp(x)) for x <= 0."""
    e = jnp.exp(x)
    # log(1 + e) = 2 atanh(s) with s = e / (2 + e) <= 1/3, and 2 s = e - s e: e, the larger part, has no error to add.
    s = e / (2 + e)
    u = s * s
    series = u * polynomial([2 * c for c in _ATANH[x.dtype.itemsize]], u)
    return e - s * (e - series)


def _limit(weight: Array) -> Array:
    """Infinity; but the largest number where the weight is 0, with which it makes 0."""
    most = largest(weight)
    return jnp.abs(weight * (1 / smallest(weight))) * most + most  # of any other at least the sum of two such numbers


@custom_jvp
def _times(weight: Array, cost: Array) -> Array:
    """weight * cost for cost >= 0, and 0 * inf is 0."""
    return weight * jnp.minimum(cost, _limit(weight))


_times.defslopes(lambda weight, cost: (cost, weight))


@custom_jvp
def sigmoids(x: Array) -> tuple[Array, Array]:
    """sigma(x) and sigma(-x) = 1 - sigma(x)."""
    e = jnp.exp(-jnp.abs(x))
    large = 1 / (1 + e)
    small = e * large
    positive = x == jnp.abs(x)
    return jnp.where(positive, large, small), jnp.where(positive, small, large)


@sigmoids.defjvp
def _sigmoids_jvp(primals: tuple[Array], tangents: tuple[Array]) -> Any:
    p, not_p = sigmoids(*primals)
    slope = p * not_p * tangents[0]
    return (p, not_p), (slope, -slope)


@custom_jvp
def _slope(x: Array, t: Array) -> Array:
    """sigma(x) - t, from that of a large |x|."""
    # By halves of e, as XLA:CPU would keep an array of a 1 that the loss has, too.
    positive, e = x == jnp.abs(x), jnp.exp(-jnp.abs(x)) / 2
    return (positive.astype(x.dtype) - t) + jnp.where(positive, -e, e) / (0.5 + e)


@_slope.defjvp
def _slope_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    p, not_p = sigmoids(primals[0])
    return _slope(*primals), p * not_p * tangents[0] - tangents[1]


@custom_jvp
def _binary_cross_entropy(x: Array, t: Array) -> Array:
    """-t log sigma(x) - (1 - t) log sigma(-x)."""
    x, t = _checks.upcast(x, t)
    slope = jnp.minimum(jnp.maximum(x, 0) * (1 / smallest(x)), 1) - t  # 1 or 0, less t
    limit = _limit(slope)
    return jnp.minimum(jnp.maximum(x, -limit), limit) * slope + _log1p_exp(-jnp.abs(x))


@_binary_cross_entropy.defjvp
def _binary_cross_entropy_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # Read and cast again: else XLA:CPU would store what the loss and its gradient have in common.
    x, t = _checks.upcast(*_platforms.reread(primals))
    dx, dt = _checks.upcast(*tangents)
    return _binary_cross_entropy(*primals), _slope(x, t) * dx + product(-x, dt)


# --- weighted and smoothed: each part by itself, so that neither loses digits to the other ---


@custom_jvp
def softplus(x: Array) -> Array:
    """What a no costs: -log sigma(-x) = log(1 + exp(x)). A yes costs as much at -x."""
    return jnp.maximum(x, 0) + _log1p_exp(-jnp.abs(x))


softplus.defslopes(lambda x: (sigmoids(x)[0],), jnp.multiply)


def _smoothed(t: Array, a: Array) -> tuple[Array, Array]:
    """T = (1 - a) t + a / 2, and 1 - T, which isn't formed from a T near 1."""
    return (1 - a) * t + a / 2, (1 - a) * (1 - t) + a / 2


@custom_jvp
def _weighted(x: Array, t: Array, w: Array, a: Array) -> Array:
    """-w T log sigma(x) - (1 - T) log sigma(-x), T the smoothed label."""
    yes, no = _smoothed(t, a)
    return _times(w * yes, softplus(-x)) + _times(no, softplus(x))


@_weighted.defjvp
def _weighted_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    (x, t), (_, _, w, a) = _platforms.reread(primals[:2]), primals  # as in _binary_cross_entropy
    dx, dt, dw, da = tangents
    (yes, no), (p, not_p) = _smoothed(t, a), sigmoids(x)
    by_label = product(_times(w, softplus(-x)) - softplus(x), (1 - a) * dt + (0.5 - t) * da)
    return _weighted(*primals), (no * p - w * yes * not_p) * dx + by_label + product(product(softplus(-x), yes), dw)


def binary_loss(x: Array, t: Array, weight: Array | None) -> Array:
    """The loss of logits by labels, booleans or numbers; ``weight`` is that of the positive class."""
    if t.dtype != bool:
        return _binary_cross_entropy(x, t) if weight is None else _weighted(x, t, weight, jnp.zeros((), x.dtype))
    cost = softplus(jnp.where(t, -x, x))
    return cost if weight is None else _times(jnp.where(t, weight, 1), cost)


# --- focal: the loss times (1 - p_t)^gamma, with p_t the probability of the label ---
# What it and its derivatives by logit and label have in common is (1 - p_t)^gamma; the rest of each is formed of numbers
# of which none is far smaller than the sum, so that no product underflows before the result does, in any order.


class _Parts(NamedTuple):
    """With m = 1 - p_t, which is about exp(-|x|) where the label is right, and c the cross-entropy, which then is too."""

    m: Array
    c: Array
    x: Array
    """The logit, and 0 for an infinite one, as is the cross-entropy then: what changes with it tells nothing any more."""
    turn: Array
    """dm/dt = sigma(-x) - sigma(x)."""
    spread: Array
    """sigma(x) sigma(-x), the derivative of sigma."""
    slope: Array
    """dc/dx = sigma(x) - t."""
    log_slope: Array
    """d log m / dx, between -1 and 1."""
    slope_to_m: Array
    """dc/dx / m, between -1 and 1."""
    c_to_m: Array
    """c / m, at least 1."""
    log_m: Array
    """log m, 0 where m is."""


def _miss(x: Array, t: Array) -> Array:
    """1 - p_t, without subtracting anything from 1 that is close to it."""
    p, not_p = sigmoids(x)
    return (1 - t) * p + t * not_p


def _parts(x: Array, t: Array) -> _Parts:
    (p, not_p), m, c = sigmoids(x), _miss(x, t), _binary_cross_entropy(x, t)
    x, c = (jnp.where(jnp.isinf(a), 0, a) for a in (x, c))
    spread, slope, side = p * not_p, (1 - t) * p - t * not_p, 1 - 2 * t
    to_m = (jnp.where(m == 0, limit, ratio(a, m)) for a, limit in ((spread, 1), (slope, side), (c, 1)))
    spread_to_m, slope_to_m, c_to_m = to_m
    right = t * p + (1 - t) * not_p
    log_m = jnp.where(m > 0.5, log1p(-right), -neg_log(jnp.where(m == 0, 1, m)))
    return _Parts(m, c, x, not_p - p, spread, slope, side * spread_to_m, slope_to_m, c_to_m, log_m)


def _times_power(x: Array, t: Array, exponent: Array, rest: Array) -> Array:
    """(1 - p_t)^exponent * rest, also where 1 - p_t underflows, or the power does and the product doesn't."""
    m = _miss(x, t)
    root = jnp.where(m == 0, jnp.exp(-exponent / 2 * jnp.minimum(jnp.abs(x), largest(x))), m ** (exponent / 2))
    return jnp.where((root == 0) | (rest == 0), 0, root * (root * rest))


@custom_jvp
def _focal(x: Array, t: Array, gamma: Array) -> Array:
    """m^gamma c."""
    return _miss(x, t) ** gamma * _binary_cross_entropy(x, t)


@custom_jvp
def _focal_by_x(x: Array, t: Array, gamma: Array) -> Array:
    """m^gamma (c' + gamma c (log m)')."""
    z = _parts(x, t)
    return z.m**gamma * (z.slope + gamma * z.log_slope * z.c)


@custom_jvp
def _focal_by_t(x: Array, t: Array, gamma: Array) -> Array:
    """m^gamma (gamma (1 - 2 p) c / m - x)."""
    z = _parts(x, t)
    return _times_power(x, t, gamma, gamma * z.turn * z.c_to_m - x)


@custom_jvp
def _focal_by_gamma(x: Array, t: Array, gamma: Array) -> Array:
    """m^gamma c log m, 0 also where m or log m is, if c is infinite."""
    z = _parts(x, t)
    factor = z.m**gamma * z.log_m
    return factor * jnp.where(factor == 0, z.c, _binary_cross_entropy(x, t))


def _focal_by_x_slopes(x: Array, t: Array, gamma: Array) -> tuple[Array, Array, Array]:
    z = _parts(x, t)
    g = gamma * z.log_slope
    of_c = 2 * z.slope + z.c * ((gamma - 1) * z.log_slope + z.turn)
    of_c_to_m = (gamma - 1) * z.log_slope * z.turn - 2 * z.spread
    by_t = gamma * (z.turn * z.slope_to_m + z.c_to_m * of_c_to_m) - 1 - g * z.x
    by_gamma = z.c * z.log_slope + z.log_m * (z.slope + g * z.c)
    return z.m**gamma * (z.spread + g * of_c), _times_power(x, t, gamma, by_t), z.m**gamma * by_gamma


def _focal_by_t_slopes(x: Array, t: Array, gamma: Array) -> tuple[Array, Array, Array]:
    z = _parts(x, t)
    twice = gamma * z.turn * ((gamma - 1) * z.turn * z.c_to_m - 2 * z.x)
    by_gamma = (1 + z.log_m * gamma) * z.turn * z.c_to_m - z.log_m * z.x
    by_x, by_t = _focal_by_x_slopes(x, t, gamma)[1], _times_power(x, t, gamma - 1, twice)
    # It may be infinite where the slope isn't, and would be NaN of a loss without weight.
    return by_x, jnp.where(jnp.isinf(by_t), 0, by_t), _times_power(x, t, gamma, by_gamma)


def _focal_by_gamma_slopes(x: Array, t: Array, gamma: Array) -> tuple[Array, Array, Array]:
    twice = _parts(x, t).log_m * _focal_by_gamma(x, t, gamma)
    return _focal_by_x_slopes(x, t, gamma)[2], _focal_by_t_slopes(x, t, gamma)[2], twice


_focal.defslopes(lambda *args: (_focal_by_x(*args), _focal_by_t(*args), _focal_by_gamma(*args)))
_focal_by_x.defslopes(_focal_by_x_slopes)
_focal_by_t.defslopes(_focal_by_t_slopes)
_focal_by_gamma.defslopes(_focal_by_gamma_slopes)


@custom_jvp
def _weighted_focal(x: Array, t: Array, gamma: Array, alpha: Array) -> Array:
    """The same, weighted by alpha t + (1 - alpha) (1 - t)."""
    return _times(alpha * t + (1 - alpha) * (1 - t), _focal(x, t, gamma))


def _signed(slope: Array, weight: Array) -> Array:
    """slope * weight; an infinite slope only takes its sign, whose derivative by the weight would be infinite."""
    return product(slope, jnp.where(jnp.isinf(slope), jnp.sign(weight), weight))


def _weighted_focal_slopes(x: Array, t: Array, gamma: Array, alpha: Array) -> tuple[Array, Array, Array, Array]:
    weight = alpha * t + (1 - alpha) * (1 - t)
    by_x, by_gamma = (_signed(slope(x, t, gamma), weight) for slope in (_focal_by_x, _focal_by_gamma))
    # Two parts that may be infinite with opposite signs: of a large logit they aren't yet, and have the sum's sign.
    large = jnp.where(jnp.isinf(x), jnp.sign(x) * largest(x) ** 0.5, x)
    by_t = product(_focal_by_t(large, t, gamma), weight) + product(_focal(large, t, gamma), 2 * alpha - 1)
    by_t = jnp.where(jnp.isinf(x) & (by_t != 0), jnp.where(by_t > 0, jnp.inf, -jnp.inf), by_t)
    return by_x, by_t, by_gamma, _signed(_focal(x, t, gamma), 2 * t - 1)


_weighted_focal.defslopes(_weighted_focal_slopes)


def _arguments(logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None) -> tuple[Array | None, Array, Array]:
    """What takes part (None: everything), logits and labels: a yes at log-odds 0 in place of what doesn't."""
    x = _checks.floating("logits", logits)
    t = _checks.dense("labels", labels, x.shape, _checks.compute_dtype(x), "logits")
    keep = _checks.where_elements(where, x.shape)
    if keep is not None:  # of a selection among 16-bit floats XLA for a TPU makes a kernel of its own
        x, t = _checks.upcast(x, t)
    return keep, _checks.only(keep, x, 0), _checks.only(keep, t, 1)


@compiled(label_smoothing=SHARES)
def sigmoid_binary_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
) -> Array:
    r"""Cross-entropy of independent yes-or-no questions: one logit, the log-odds for yes, and one label for each.

    .. math:: -t \log \sigma(x) - (1 - t) \log \sigma(-x) =
        \begin{cases} (1 - t)\, x + \log(1 + e^{-x}) & x > 0 \\ t\, |x| + \log(1 + e^x) & x \le 0 \end{cases}

    with derivatives :math:`\sigma(x) - t` by the logit and :math:`-x` by the label. In nats, never negative for labels
    in [0, 1], and right to 2 ulp (gradient: 4 ulp of the larger of sigma(x) and t) at every size of logit, except that
    XLA:CPU takes a loss below the smallest normal number for 0. An infinite logit costs 0 if its label agrees fully,
    with gradient 0, and +inf otherwise. An empty array gives an empty array. Optax's function has the same name and
    meaning.

    With ``pos_weight`` w and ``label_smoothing`` a it is, with derivative :math:`(1 - T)\, \sigma(x) - w\, T\, \sigma(-x)`,

    .. math:: -w\, T \log \sigma(x) - (1 - T) \log \sigma(-x), \qquad T = (1 - a)\, t + a / 2,

    right to 4 ulp (gradient: of the larger of its two parts).

    Args:
      logits: floating point, of any shape.
      labels: probabilities of yes, floating point, integer or boolean, of the same shape or one that broadcasts to it.
      where: what takes part: booleans or integers (what isn't 0) with as many axes as logits, which broadcast to
        them. The rest has loss 0 and gradient 0, whatever it holds.
      pos_weight: weight of the positive class, a number or an array that broadcasts to logits; negatives / positives
        of the data balances the two. PyTorch's meaning, soft labels included.
      label_smoothing: what share of each label is replaced by 1/2, in [0, 1]: a number or an array, as pos_weight.
        Keras's meaning.

    Returns:
      The loss of each entry, in the shape of logits: float32 for half precision, else the widest of the dtypes.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.sigmoid_binary_cross_entropy(jnp.array([0.0, 40.0, -2.0, jnp.inf]), jnp.array([1, 1, 1, 1])))
      [6.931472e-01 4.248354e-18 2.126928e+00 0.000000e+00]
      >>> labels = jnp.array([True, False, True])
      >>> print(jaxce.sigmoid_binary_cross_entropy(jnp.zeros(3), labels, pos_weight=2))
      [1.3863 0.6931 1.3863]
      >>> missing = jnp.array([1.0, 0.0, jnp.nan])
      >>> print(jaxce.sigmoid_binary_cross_entropy(jnp.zeros(3), missing, where=~jnp.isnan(missing)))
      [0.6931472 0.6931472 0. ]

    References:
      Cox, "The Regression Analysis of Binary Sequences", JRSS B 20 (1958).
    """
    keep, x, t = _arguments(logits, labels, where)
    if pos_weight is None and label_smoothing is None:
        loss = _binary_cross_entropy(x, t)
    else:
        dtype = _checks.compute_dtype(x, t)
        w = _checks.dense("pos_weight", 1 if pos_weight is None else pos_weight, x.shape, dtype, "logits")
        x, t, w = _checks.upcast(x, t, _checks.only(keep, w, 1))
        a = jnp.asarray(0 if label_smoothing is None else label_smoothing)
        if a.ndim:
            a = _checks.only(keep, _checks.dense("label_smoothing", a, x.shape, dtype, "logits"), 0)
        loss = _weighted(x, t, w, a.astype(x.dtype))
    return _checks.only(keep, loss, 0)


@compiled(alpha=SHARE._replace(neutral=None, broadcasts=True), gamma=NOT_NEGATIVE._replace(broadcasts=True))
def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> Array:
    r"""Binary cross-entropy that down-weights examples that are already classified well.

    .. math::
        \alpha_t (1 - p_t)^\gamma \cdot \text{binary cross-entropy}, \qquad
        p_t = t\, \sigma(x) + (1 - t)\, \sigma(-x), \quad \alpha_t = \alpha t + (1 - \alpha)(1 - t)

    where 1 - p_t is formed without subtracting from 1, and without weights (:math:`\alpha_t = 1`) if alpha is None. With
    gamma = 0 it is `sigmoid_binary_cross_entropy` exactly. No derivative by the logits is NaN, also for gamma below 1
    and where 1 - p_t is 0 or underflows. The values are right to 3 + 3 gamma ulp. Infinite logits, empty arrays and
    dtypes are treated as in that function. Optax's formula and arguments, except that None and not a negative alpha
    means no weights.

    Args:
      logits: floating point, of any shape.
      labels: probabilities of yes, floating point, integer or boolean, of the same shape or one that broadcasts to it.
      alpha: weight of yes, in [0, 1], against 1 - alpha for no: a number, or an array that broadcasts to logits, such as
        one number for each question.
      gamma: the exponent, at least 0; the larger, the less examples count that are classified well. A number or an array,
        as alpha.
      where: what takes part, as in `sigmoid_binary_cross_entropy`.

    Returns:
      The loss of each entry, in the shape of logits.

    Examples:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.sigmoid_focal_loss(jnp.array([0.0, 4.0, -4.0]), jnp.array([1, 1, 1])))
      [1.7329e-01 5.8716e-06 3.8749e+00]

    References:
      Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, https://arxiv.org/abs/1708.02002.
    """
    keep, x, t = _arguments(logits, labels, where)
    given = {"alpha": 1 if alpha is None else alpha, "gamma": 0 if gamma is None else gamma}
    dtype = _checks.compute_dtype(x, t)
    arrays = (_checks.dense(name, value, x.shape, dtype, "logits") for name, value in given.items())
    x, t, a, g = _checks.upcast(x, t, *(_checks.only(keep, array, 1) for array in arrays))
    if alpha is not None:
        loss = _weighted_focal(x, t, g, a)
    else:
        loss = _binary_cross_entropy(x, t) if gamma is None else _focal(x, t, g)
    return _checks.only(keep, loss, 0)
