"""Entropies and divergences of softmax distributions, from their logits.

Arguments stand in mathematical order, as in _information.py; probabilities are never formed where they would round.
"""

from __future__ import annotations

from jax import Array
from jax.typing import ArrayLike

from jaxce import _checks, _numerics, _rows
from jaxce._checks import Axis, compiled
from jaxce._statistics import read_logits


@compiled("axis", "base")
def entropy_with_logits(
    logits: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, *, base: float | None = None
) -> Array:
    r"""Entropy of softmax(logits), the mean surprisal of a class drawn from it.

    With the gaps :math:`g_k = \max_j x_j - x_k` and :math:`L = \log \sum_k e^{-g_k}`,

    .. math:: H(p) = -\sum_k p_k \log p_k = \sum_k p_k g_k + L,

    where both terms are at least 0, so that a nearly certain distribution has an entropy with all its digits. A class that
    is masked, or whose logit is -inf, isn't there. A row with none left has entropy 0. The derivative by :math:`x_j` is
    :math:`p_j (g_j - \sum_k p_k g_k)`. Measured on CPU: within 2 ulp up to 1000 classes, 4 beyond.

    Args:
      logits: scores, of shape [..., classes].
      axis: the class axis, or several.
      where: which rows (a mask of the batch shape) or which entries of the logits take part.
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      Entropies of the batch shape, in float32 for half-precision logits.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.entropy_with_logits(jnp.array([[0.0, 0.0, 0.0, 0.0], [0.0, 50.0, 0.0, -jnp.inf]]), base=2))
      [2.0000e+00 2.8383e-20]

    Source: Cover and Thomas, Elements of Information Theory, 2006, section 2.1.
    """
    log_base = _checks.log_base("entropy_with_logits", base)
    z = read_logits("entropy_with_logits", "logits", logits, axis, where)
    return _numerics.in_units(_numerics.single(_rows.entropy(z.x, z.row)), log_base)


@compiled("axis", "base")
def cross_entropy_with_logits(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    base: float | None = None,
) -> Array:
    r"""Cross-entropy :math:`H(p, q) = -\sum_k p_k \log q_k` of p = softmax(p_logits) and q = softmax(q_logits).

    It is the mean surprisal under q of a class drawn from p, and :math:`H(p, q) = H(p) + D(p \| q)`. A class that isn't
    there in p adds nothing; one that isn't there in q alone makes the result +inf. A row with none left in p or in q is 0.

    Args:
      p_logits: logits of the classes, which lie along ``axis``.
      q_logits: logits of the same shape.
      axis: the class axis, or several.
      where: which rows (a mask of the batch shape) or which entries take part.
      base: base of the logarithm; None for nats, 2 for bits.

    Returns:
      One value per example, in the wider dtype of the two and at least float32.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.cross_entropy_with_logits(jnp.array([0.0, 0.0]), jnp.array([0.0, 1.0])))
      0.81326

    Source: Murphy, Probabilistic Machine Learning: An Introduction, 2022, section 6.1.2.
    """
    name = "cross_entropy_with_logits"
    log_base = _checks.log_base(name, base)
    given = [_checks.floating(name, "p_logits", p_logits), _checks.floating(name, "q_logits", q_logits)]
    _checks.same_shape(name, "q_logits", given[1], given[0].shape, "the shape of p_logits")
    p = read_logits(name, "p_logits", given[0], axis, where, given[1])
    q = read_logits(name, "q_logits", given[1], axis, where, given[0])
    return _numerics.in_units(_numerics.single(_rows.dense_nll(q.x, q.row, _rows.probabilities(p.x, p.row))), log_base)
