"""The recipes, the functions as they stand on their pages, against the same formulas in NumPy and float64."""

from __future__ import annotations

import doctest
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

import jaxce

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import heads

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
PAGES = {name: (NOTEBOOKS / f"{name}.md").read_text(encoding="utf-8") for name in ("recipes", "migration")}
TOLERANCE = dict(rtol=2e-5, atol=2e-6)  # float32 matrix products and sums of a few terms near 1
N, D, K = 6, 4, 3
X, KERNEL, DIRECTION = (np.random.default_rng(i).normal(size=size) for i, size in enumerate(((N, D), (D, K), (D, K))))
LABELS = np.array([0, 1, -100, 2, -100, -100])


@pytest.fixture(scope="module")
def recipes() -> dict[str, Any]:
    """What the pages define; that their examples print what they say is a test of the pages themselves."""
    names: dict[str, Any] = {}
    for name, page in PAGES.items():
        for example in doctest.DocTestParser().get_examples(page):
            if example.source.startswith(("import", "from", "def", "@", "optimizer", "keys =", "hidden, head =")):
                exec(compile(example.source, f"<{name}>", "exec"), names)
    return names


def f32(*arrays: Any) -> Any:
    return tuple(jnp.asarray(np.asarray(a, "float32" if np.asarray(a).dtype.kind == "f" else "int32")) for a in arrays)


def log_p(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each label, 0 for a label of padding."""
    picked = np.take_along_axis(scipy.special.log_softmax(logits, -1), np.maximum(labels, 0)[..., None], -1)[..., 0]
    return np.where(labels == -100, 0, picked)


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, **TOLERANCE)


def gradient(loss: Any, at: np.ndarray) -> np.ndarray:
    """By central differences in float64: 1e-9 exact."""
    flat = [(loss(at + h) - loss(at - h)) / 2e-5 for h in 1e-5 * np.eye(at.size).reshape(-1, *at.shape)]
    return np.reshape(flat, at.shape)


def mean_nll(kernel: np.ndarray) -> float:
    return -log_p(X @ kernel, LABELS).sum() / (LABELS != -100).sum()


def test_accumulation(recipes: dict[str, Any]) -> None:
    """Micro-batches of which one has no example that counts, and others not equally many."""
    x, labels, kernel = f32(X.reshape(3, 2, D), LABELS.reshape(3, 2), KERNEL)
    loss, gradients = recipes["accumulate"]({"kernel": kernel}, x, labels)
    close(loss, mean_nll(KERNEL))
    close(gradients["kernel"], gradient(mean_nll, KERNEL))
    close(jax.grad(recipes["summed_loss"])({"kernel": kernel}, x, labels)["kernel"], gradient(mean_nll, KERNEL))


def test_hessian_product(recipes: dict[str, Any]) -> None:
    x, labels, kernel, direction = f32(X.reshape(3, 2, D), LABELS.reshape(3, 2), KERNEL, DIRECTION)
    got = recipes["hessian_product"]({"kernel": kernel}, {"kernel": direction}, x, labels)["kernel"]
    p = scipy.special.softmax(X @ KERNEL, -1)
    moved = X @ DIRECTION
    by_logits = p * (moved - (p * moved).sum(-1, keepdims=True)) * (LABELS != -100)[:, None] / (LABELS != -100).sum()
    close(got, X.T @ by_logits)


def test_half_precision(recipes: dict[str, Any]) -> None:
    x, labels, kernel = f32(X, LABELS, KERNEL)
    loss, gradients = jax.jit(jax.value_and_grad(recipes["half_loss"]))({"kernel": kernel}, x, labels)
    assert loss.dtype == gradients["kernel"].dtype == jnp.float32
    with jax.numpy_dtype_promotion("strict"):
        logits = x.astype(jnp.bfloat16) @ kernel.astype(jnp.bfloat16)  # what the loss is given: rounded to bfloat16
    log_q = scipy.special.log_softmax(np.asarray(logits, np.float64), -1)
    smooth = 0.9 * np.eye(K)[np.maximum(LABELS, 0)] + 0.1 / K
    counts = LABELS != -100
    close(loss, -(smooth * log_q).sum(-1)[counts].mean())
    by_logits = np.where(counts[:, None], np.exp(log_q) - smooth, 0) / counts.sum()
    exact = X.T @ by_logits
    assert np.abs(gradients["kernel"] - exact).max() < 2**-8 * 4 * np.abs(exact).max()  # a few roundings to 8 bits


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def head(recipes: dict[str, Any]) -> np.ndarray:
    return np.asarray(recipes["head"], np.float64)


def test_distillation(recipes: dict[str, Any], head: np.ndarray, rng: np.random.Generator) -> None:
    student = rng.normal(size=(5, len(head)))
    teacher = np.asarray(recipes["hidden"], np.float64)

    def loss(student: np.ndarray) -> float:
        p, q = (scipy.special.log_softmax(h @ head / 2, -1) for h in (teacher, student))
        return 4 * (np.exp(p) * (p - q)).sum(-1).mean()

    loss_and_slope = jax.jit(jax.value_and_grad(recipes["distillation_loss"]))
    value, (slope, _) = loss_and_slope(tuple(f32(student, head)), tuple(f32(teacher, head)))
    close(value, loss(student))
    close(slope, gradient(loss, student))


def test_dpo(recipes: dict[str, Any], head: np.ndarray, rng: np.random.Generator) -> None:
    states = rng.normal(size=(4, 2, 3, len(head)))
    chosen, rejected = np.array([[1, 2, 3], [4, -100, -100]]), np.array([[9, 5, -100], [7, 7, 7]])

    def loss(policy: np.ndarray) -> float:
        of = [
            log_p(h @ head, tokens).sum(-1)
            for h, tokens in zip([*policy, *states[2:]], 2 * (chosen, rejected), strict=True)
        ]
        margin = 0.1 * (of[0] - of[2] - of[1] + of[3])
        return ((1 - smoothing) * np.logaddexp(0, -margin) + smoothing * np.logaddexp(0, margin)).mean()

    policy, reference = f32(states[:2], states[2:])
    dpo = jax.jit(jax.value_and_grad(recipes["dpo_loss"]))
    for smoothing in (0.0, 0.2):
        value, slope = dpo(policy, reference, *f32(head, chosen, rejected), label_smoothing=smoothing)
        close(value, loss(states[:2]))
        close(slope, gradient(loss, states[:2]))


def test_policy(recipes: dict[str, Any], head: np.ndarray, rng: np.random.Generator) -> None:
    states = rng.normal(size=(2, 3, len(head)))
    allowed = rng.uniform(size=(2, 3, head.shape[1])) < 0.01
    allowed[..., 0] = True
    actions = allowed.argmax(-1)
    log_q = scipy.special.log_softmax(np.where(allowed, states @ head / 0.5, -np.inf), -1)
    got = recipes["act"](*f32(states, head, actions), jnp.asarray(allowed), temperature=0.5)
    close(got[0], log_p(np.where(allowed, states @ head / 0.5, -np.inf), actions))
    close(got[1], scipy.special.entr(np.exp(log_q)).sum(-1))


def test_grpo(recipes: dict[str, Any], head: np.ndarray, rng: np.random.Generator) -> None:
    """Ratios on both sides of the clip, advantages of both signs, and answers that are not equally long."""
    states = rng.normal(size=(3, 4, len(head)))
    actions = rng.integers(head.shape[1], size=(3, 4))
    actions[1, 2:] = -100
    counts = actions != -100
    now = log_p(states @ head / 0.7, actions)
    old, reference = now + 0.4 * rng.normal(size=(2, 3, 4))
    rewards = np.array([1.0, 0.0, 0.5])
    advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-6))[:, None]

    def loss(states: np.ndarray) -> float:
        now = log_p(states @ head / 0.7, actions)
        ratio, far = np.exp(now - old), np.where(counts, reference - now, 0)
        gain = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
        return ((0.04 * (np.exp(far) - far - 1) - gain) * counts).sum() / counts.sum()

    assert (np.abs(np.exp(now - old)[counts] - 1) > 0.2).any() and (np.abs(np.exp(now - old)[counts] - 1) < 0.2).any()
    value, slope = jax.jit(jax.value_and_grad(recipes["grpo_loss"]))(
        *f32(states, head, actions, old, reference, rewards)
    )
    close(value, loss(states))
    close(slope, gradient(loss, states))


def test_the_divergence_of_grpo_is_a_mean_of_its_estimates(rng: np.random.Generator) -> None:
    """Over actions drawn by the policy, exp(far) - far - 1 is on average D(policy || reference), which LinearLogits has."""
    policy, reference = rng.normal(size=(2, 5))
    log_q, log_r = scipy.special.log_softmax(policy), scipy.special.log_softmax(reference)
    expected = np.sum(np.exp(log_q) * (np.expm1(log_r - log_q) - (log_r - log_q)))
    close(jaxce.relative_entropy_with_logits(*f32(policy, reference)), expected)


def test_evaluation(recipes: dict[str, Any]) -> None:
    """As a scan over batches, and vmapped over an ensemble."""
    kernels = np.stack([KERNEL, DIRECTION, 0 * KERNEL])
    x, labels = f32(X.reshape(3, 2, D), LABELS.reshape(3, 2))
    got = jax.vmap(recipes["evaluate"], (0, None, None))({"kernel": jnp.asarray(kernels, jnp.float32)}, x, labels)
    counts = LABELS != -100
    logits = X[counts] @ kernels
    close(got.nll, [-log_p(z, LABELS[counts]).mean() for z in logits])
    close(got.perplexity, [np.exp(-log_p(z, LABELS[counts]).mean()) for z in logits])
    close(got.accuracy[:2], (logits.argmax(-1) == LABELS[counts])[:2].mean(-1))


def test_loss_and_metrics(recipes: dict[str, Any], head: np.ndarray, rng: np.random.Generator) -> None:
    """The loss with its metrics, and the argmax in the right place."""
    hidden, labels = rng.normal(size=(5, len(head))), rng.integers(head.shape[1], size=5)
    labels[:2] = (hidden[:2] @ head).argmax(-1)
    labels[4] = -100
    loss, metrics = recipes["loss_and_metrics"](*f32(hidden, head, labels))
    log_q = scipy.special.log_softmax(hidden @ head, -1)[:4]
    close(loss, -log_p(hidden @ head, labels)[:4].mean())
    close(metrics["entropy"], scipy.special.entr(np.exp(log_q)).sum(-1).mean())
    close(metrics["accuracy"], (log_q.argmax(-1) == labels[:4]).mean())


def test_tied_embedding(recipes: dict[str, Any], head: np.ndarray, rng: np.random.Generator) -> None:
    """Casting the embedding rounds it to bfloat16, and nothing else."""
    hidden, embedding = (x.astype(jnp.bfloat16) for x in f32(rng.normal(size=(5, len(head))), head.T))
    value, slope = jax.jit(jax.value_and_grad(recipes["tied_loss"], 1))(
        hidden, embedding.astype(jnp.float32), jnp.arange(5)
    )
    close(value, -log_p(np.asarray(hidden, float) @ np.asarray(embedding, float).T, np.arange(5)).mean())
    assert slope.dtype == jnp.float32


def test_clip(recipes: dict[str, Any], rng: np.random.Generator) -> None:
    images, texts = rng.normal(size=(2, 5, 4))

    def loss(images: np.ndarray, log_scale: float = 1.5) -> float:
        a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts))
        logits = np.exp(log_scale) * a @ b.T
        return -(log_p(logits, np.arange(5)) + log_p(logits.T, np.arange(5))).mean() / 2

    value, slopes = jax.jit(jax.value_and_grad(recipes["clip_loss"], (0, 2)))(*f32(images, texts, np.array(1.5)))
    close(value, loss(images))
    close(slopes[0], gradient(loss, images))
    close(slopes[1], (loss(images, 1.5 + 1e-5) - loss(images, 1.5 - 1e-5)) / 2e-5)


def test_heteroscedastic_and_mixture_density(recipes: dict[str, Any], rng: np.random.Generator) -> None:
    log_weights, location, log_scale = rng.normal(size=(3, 5, 3))
    y = rng.normal(size=5)
    log_p_of = scipy.stats.norm.logpdf(y[:, None], location, np.exp(log_scale))
    got = recipes["heteroscedastic_loss"](*f32(np.stack([location[:, 0], log_scale[:, 0]], -1), y))
    close(got, -log_p_of[:, 0].mean())
    expected = -scipy.special.logsumexp(scipy.special.log_softmax(log_weights, -1) + log_p_of, -1).mean()
    close(recipes["mixture_density_loss"](*f32(log_weights, location, log_scale, y)), expected)


def test_zero_inflated(recipes: dict[str, Any], rng: np.random.Generator) -> None:
    zero_logits, log_rate = rng.normal(size=(2, 5))
    counts = np.array([0.0, 3.0, 0.0, 1.0, 7.0])

    def loss(zero_logits: np.ndarray) -> float:
        zero = scipy.special.expit(zero_logits)
        p = (1 - zero) * scipy.stats.poisson.pmf(counts, np.exp(log_rate))
        return -np.log(np.where(counts == 0, zero, 0) + p).mean()

    value, slope = jax.jit(jax.value_and_grad(recipes["zero_inflated_loss"]))(*f32(zero_logits, log_rate, counts))
    close(value, loss(zero_logits))
    close(slope, gradient(loss, zero_logits))


def test_negative_elbo(recipes: dict[str, Any], rng: np.random.Generator) -> None:
    logits, pixels = rng.normal(size=(3, 4)), rng.integers(2, size=(3, 4)) * 1.0
    location, log_scale = rng.normal(size=(2, 3, 2))
    nll = -scipy.stats.bernoulli.logpmf(pixels, scipy.special.expit(logits)).sum(-1)
    divergence = (0.5 * (np.exp(2 * log_scale) + location**2 - 1) - log_scale).sum(-1)
    close(recipes["negative_elbo"](*f32(logits, pixels, location, log_scale)), (nll + divergence).mean())


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_disagreement(recipes: dict[str, Any], rng: np.random.Generator, size: float) -> None:
    """Of models that agree but for a thousandth the difference of entropies in float32 has no digits left."""
    (p,) = f32(scipy.special.softmax(size * rng.normal(size=(5, 6, 4)), -1))
    joint = np.moveaxis(np.asarray(p, float), 0, 1)
    joint /= joint.sum((-2, -1), keepdims=True)
    marginals = joint.sum(-1, keepdims=True), joint.sum(-2, keepdims=True)
    expected = scipy.special.rel_entr(joint, marginals[0] * marginals[1]).sum((-2, -1))
    np.testing.assert_allclose(recipes["disagreement"](p), expected, rtol=1e-5)  # float32, and terms of second order


# Losses of other trainers, written from their sources: T5X' `losses.compute_weighted_cross_entropy` and that of Flax'
# lm1b example, and MaxText's `cross_entropy_with_logits`, which is T5X' too.


def of_t5x(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, smoothing: float, z_loss: float) -> Any:
    classes = logits.shape[-1]
    low = smoothing / (classes - 1)
    constant = -((1 - smoothing) * np.log(1 - smoothing) + (classes - 1) * low * np.log(low + 1e-20))
    targets = np.where(np.arange(classes) == labels[..., None], 1 - smoothing, low)
    log_z = scipy.special.logsumexp(logits, -1)
    z_term = z_loss * log_z**2
    loss = -(targets * (logits - log_z[..., None])).sum(-1) + z_term - constant
    return (loss * weights).sum(), (z_term * weights).sum(), weights.sum()


def test_t5x_and_flax(rng: np.random.Generator) -> None:
    """The page's rows: s for the other classes together is our s K / (K - 1), and they subtract the labels' entropy."""
    logits, labels, weights = (
        rng.normal(size=(4, 5, 7)) * 3,
        rng.integers(7, size=(4, 5)),
        rng.integers(2, size=(4, 5)) * 1.0,
    )
    expected = of_t5x(logits, labels, weights, 0.1, 0.01)
    calls = re.findall(r"^\| `\(x, y, s, .+?\)\[(\d)\]` \| `([^|]+)` \|", PAGES["migration"], re.M)
    assert [int(i) for i, _ in calls] == [0, 1, 2]
    names = {name: getattr(jaxce, name) for name in jaxce.__all__}
    names |= dict(zip("xys", f32(logits, labels, weights), strict=True)) | {"jnp": jnp, "K": 7}
    for i, call in calls:
        np.testing.assert_allclose(eval(call, names), expected[int(i)], rtol=2e-5)  # a sum of 20 terms in float32


def test_maxtext(rng: np.random.Generator) -> None:
    """The pair that is logged, [B, T] each: the loss with its z-term, and the z-term alone."""
    logits, labels = rng.normal(size=(2, 5, K)) * 3, rng.integers(K, size=(2, 5))
    statistics = jaxce.softmax_statistics(*f32(logits, labels))
    z_term = 1e-2 * statistics.log_normalizer**2
    for i, row in enumerate(np.ndindex(2, 5)):
        expected = of_t5x(logits[row], labels[row], np.ones(()), 1e-30, 1e-2)
        close((statistics.nll + z_term).ravel()[i], expected[0])
        close(z_term.ravel()[i], expected[1])


def test_t5x_from_hidden_states(recipes: dict[str, Any], rng: np.random.Generator) -> None:
    """The sum, its z-term and the denominator, with weights that aren't only 0 and 1."""
    hidden, kernel = rng.normal(size=(2, 5, 4)), rng.normal(size=(4, K))
    labels, weights = rng.integers(K, size=(2, 5)), rng.integers(3, size=(2, 5)) / 2
    got = recipes["t5x_loss"](*f32(hidden, kernel, labels, weights), z_loss=0.1)
    for value, expected in zip(got, of_t5x(hidden @ kernel, labels, weights, 1e-30, 0.1), strict=True):
        close(value, expected)


def test_maxtext_tiles(recipes: dict[str, Any], rng: np.random.Generator) -> None:
    """The sum over the tokens of all segments, and its z-term."""
    hidden, kernel = rng.normal(size=(2, 5, 4)), rng.normal(size=(4, K))
    labels, segments = rng.integers(K, size=(2, 5)), rng.integers(3, size=(2, 5))
    total, z_term = recipes["maxtext_loss"](*f32(hidden, kernel, labels, segments), z_loss=0.1)
    expected = of_t5x(hidden @ kernel, labels, segments != 0, 1e-30, 0.1)
    close(total, expected[0])
    close(z_term, expected[1])


def test_easylm(recipes: dict[str, Any], rng: np.random.Generator) -> None:
    """The mean of each sequence, then of the sequences, of which one has no token that counts."""
    logits, labels = 2 * rng.normal(size=(3, 5, K)), rng.integers(K, size=(3, 5))
    valid = np.array([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], float)
    length = np.maximum(valid.sum(-1), 1e-10)
    loss, accuracy = recipes["easylm_loss"](*f32(logits, labels, valid))
    close(loss, -((log_p(logits, labels) * valid).sum(-1) / length).mean())
    close(accuracy, (((logits.argmax(-1) == labels) * valid).sum(-1) / length).mean())


def test_tunix(recipes: dict[str, Any], rng: np.random.Generator) -> None:
    hidden, kernel, labels = rng.normal(size=(2, 5, 4)), rng.normal(size=(4, K)), rng.integers(K, size=(2, 5))
    got = recipes["tunix_logps"](*f32(hidden, kernel, labels), temperature=0.5)
    logits = hidden @ kernel / 0.5
    close(got[0], log_p(logits, labels))
    close(got[1], scipy.special.entr(scipy.special.softmax(logits, -1)).sum(-1))


# Losses of pairs, written from the sources of open_clip's `loss.py`, big_vision's `siglip.py`, TensorFlow Recommenders'
# `tasks/retrieval.py` and `layers/loss.py`, and sentence-transformers' `losses`, of which each has the array of all pairs.


def mean_at_labels(scores: np.ndarray) -> float:
    """torch's cross_entropy(scores, arange(rows))."""
    return -log_p(scores, np.arange(len(scores))).mean()


def unit_vectors(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def of_open_clip(images: np.ndarray, texts: np.ndarray, scale: float) -> float:
    return (mean_at_labels(scale * images @ texts.T) + mean_at_labels(scale * texts @ images.T)) / 2


def of_siglip(images: np.ndarray, texts: np.ndarray, scale: float, bias: float) -> float:
    """open_clip: -logsigmoid(labels * logits).sum() / N with labels 2 eye - 1; in big_vision the mean of the rows' sums."""
    signs = 2 * np.eye(len(images)) - 1
    return -scipy.special.log_expit(signs * (scale * images @ texts.T + bias)).sum(-1).mean()


def check_all(name: str, ours: Any, theirs: Any, sides: Any, *numbers: float) -> None:
    """Value, and gradients by one side and by the numbers."""
    both = jax.jit(jax.value_and_grad(ours, (0, *range(2, 2 + len(numbers)))))
    value, slopes = both(*f32(*sides, *map(np.array, numbers)))
    close(value, theirs(*sides, *numbers))
    close(slopes[0], gradient(lambda x: theirs(x, sides[1], *numbers), sides[0]))
    by_numbers = gradient(lambda x: theirs(*sides, *x), np.array(numbers)) if numbers else []
    for got, expected in zip(slopes[1:], by_numbers, strict=True):
        np.testing.assert_allclose(got, expected, **TOLERANCE, err_msg=name)


def test_open_clip_and_big_vision(recipes: dict[str, Any], rng: np.random.Generator) -> None:
    sides = unit_vectors(rng, 2, 5, 4)
    check_all("ClipLoss", recipes["open_clip_loss"], of_open_clip, sides, 3.0)
    check_all("SigLipLoss", recipes["open_clip_siglip_loss"], of_siglip, sides, 3.0, -1.5)


def test_siglip(recipes: dict[str, Any], rng: np.random.Generator) -> None:
    """The recipe, whose embeddings have any length and whose scale is the exponential of a parameter."""

    def theirs(images: np.ndarray, texts: np.ndarray, log_scale: float, bias: float) -> float:
        a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts))
        return of_siglip(a, b, np.exp(log_scale), bias)

    check_all("recipe", recipes["siglip_loss"], theirs, rng.normal(size=(2, 5, 4)), 1.5, -1.5)


def of_recommenders(
    queries: Any, candidates: Any, weights: Any, probability: Any, ids: Any, temperature: float
) -> float:
    scores = queries @ candidates.T / temperature
    labels = np.eye(*scores.shape)
    if probability is not None:
        scores = scores - np.log(probability)
    if ids is not None:  # of accidental hits
        duplicate = (ids[labels.argmax(1)][:, None] == ids[None]) - labels
        scores = scores + duplicate * (np.finfo(np.float32).min / 100)
    losses = -(labels * scipy.special.log_softmax(scores, -1)).sum(-1)
    return (losses * (1 if weights is None else weights)).sum()


@pytest.mark.parametrize("chosen", [(), *(pytest.param((i,), marks=pytest.mark.slow) for i in range(3)), (0, 1, 2)])
def test_retrieval(recipes: dict[str, Any], rng: np.random.Generator, chosen: tuple[int, ...]) -> None:
    """With more candidates than queries, of which some are the same item, and each option alone and with all."""
    queries, candidates = rng.normal(size=(5, 4)), rng.normal(size=(8, 4))
    given = rng.uniform(0.5, 2, 5), rng.uniform(0.01, 0.9, 8), np.array([3, 1, 3, 4, 5, 1, 6, 3])
    options = [x if i in chosen else None for i, x in enumerate(given)]
    arrays = [None if x is None else f32(x)[0] for x in options]

    def ours(a: Any, b: Any, t: Any) -> Any:
        return recipes["retrieval_loss"](a, b, *arrays, temperature=t)

    def theirs(a: Any, b: Any, t: Any) -> Any:
        return of_recommenders(a, b, *options, t)

    check_all(f"{chosen}", ours, theirs, (queries, candidates), 0.5)


def of_sentence_transformers(anchors: np.ndarray, candidates: np.ndarray, scale: float, symmetric: bool) -> float:
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (anchors, candidates))
    scores = scale * a @ b.T
    forward, backward = mean_at_labels(scores), mean_at_labels(scores[:, : len(a)].T)
    return (forward + backward) / 2 if symmetric else forward


@pytest.mark.parametrize("symmetric", [False, True])
def test_sentence_transformers(recipes: dict[str, Any], rng: np.random.Generator, symmetric: bool) -> None:
    """With hard negatives after the positives."""

    def ours(a: Any, b: Any, scale: Any) -> Any:
        return recipes["ranking_loss"](a, b, scale, symmetric)

    def theirs(a: Any, b: Any, scale: Any) -> Any:
        return of_sentence_transformers(a, b, scale, symmetric)

    check_all("ranking", ours, theirs, (rng.normal(size=(4, 4)), rng.normal(size=(9, 4))), 5.0)


@pytest.mark.parametrize("views", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_optax_ntxent(recipes: dict[str, Any], rng: np.random.Generator, views: int) -> None:
    (x,) = f32(rng.normal(size=(4 * views, 4)))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = jax.jit(jax.value_and_grad(optax.losses.ntxent))(x, jnp.arange(4 * views) % 4, 0.2)
    got = jax.jit(jax.value_and_grad(recipes["ntxent"]), static_argnums=1)(x, views, 0.2)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, **TOLERANCE)


@pytest.mark.parametrize(
    "trainer", [name if name == "EasyLM" else pytest.param(name, marks=pytest.mark.slow) for name in heads.TRAINERS]
)
def test_losses_of_the_table(trainer: str, rng: np.random.Generator) -> None:
    """What is compiled to compare memory gives the same numbers, and the same gradients."""
    arrays = f32(rng.normal(size=(2, 512, 4)), rng.normal(size=(4, K)), rng.integers(K, size=(2, 512)))
    arrays += f32(rng.integers(2, size=(2, 512)) * 1.0)
    own, *ours = (
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(*arrays) for f in heads.TRAINERS[trainer].values()
    )
    for found in ours:
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(own), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())  # sums of 1024 terms in float32
