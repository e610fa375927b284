"""The demonstration: a language model of Python's own manual, trained with jaxce's loss.

``python -m jaxce`` needs no download: the text is ``pydoc_data.topics`` from the standard library. It learns sub-word
tokens, trains a small causal transformer for about a minute on two cores, and prints how much memory the loss needs, how
well the model predicts text that it has not seen, beside baselines, how exact the gradient of the loss is, and text that
the model writes.
"""

from __future__ import annotations

import argparse
import collections
import heapq
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import sys
import textwrap
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

import jaxce

WINDOW = 64  # tokens that the model sees at once
WIDTH = 128
PROMPT = 16  # held-out tokens that the model is given to continue
TEMPERATURE = 0.8  # of the sample that isn't greedy
LAYERS = 2
HEADS = 4
DROPOUT = 0.2

Params = dict[str, Any]


# The text and its tokens


def load_text() -> tuple[str, str]:
    """The manual as (training text, held-out text): each paragraph once, cut after the first nine tenths.

    Topics quote each other: kept twice, a fifth of the text would be there for the model to remember.
    """
    from pydoc_data.topics import topics

    paragraphs = dict.fromkeys("\n\n".join(topics[name] for name in sorted(topics)).split("\n\n"))
    text = "\n\n".join(paragraphs)
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


class Tokenizer:
    """Byte-pair encoding: the 256 bytes, and the pairs of tokens within words that were merged, most frequent first.

    Every text can be written in it, as any byte is a token.
    """

    def __init__(self, text: str, size: int) -> None:
        self.pieces = [bytes([b]) for b in range(256)]
        self.ranks: dict[tuple[int, int], int] = {}
        self.known: dict[str, list[int]] = {}
        counts = collections.Counter(self.split(text))
        words, weights = [list(word.encode()) for word in counts], list(counts.values())
        pairs: collections.Counter[tuple[int, int]] = collections.Counter()
        places: dict[tuple[int, int], set[int]] = collections.defaultdict(set)
        for i, word in enumerate(words):
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += weights[i]
                places[pair].add(i)
        heap = [(-count, pair) for pair, count in pairs.items()]
        heapq.heapify(heap)
        while heap and len(self.pieces) < size:
            negative, best = heapq.heappop(heap)
            if -negative != pairs[best] or pairs[best] < 2:
                continue  # an old entry, from before the count changed
            new = self.ranks[best] = len(self.pieces)
            self.pieces.append(self.pieces[best[0]] + self.pieces[best[1]])
            changed: set[tuple[int, int]] = set()
            for i in places[best]:
                before, words[i] = words[i], self._merge(words[i], best, new)
                for pair in zip(before, before[1:], strict=False):
                    pairs[pair] -= weights[i]
                    changed.add(pair)
                for pair in zip(words[i], words[i][1:], strict=False):
                    pairs[pair] += weights[i]
                    places[pair].add(i)
                    changed.add(pair)
            for pair in changed:
                heapq.heappush(heap, (-pairs[pair], pair))

    @staticmethod
    def split(text: str) -> list[str]:
        """Words with the space before them, and runs of digits, marks and white space: joined they are ``text``."""
        return re.findall(r" ?[^\W\d_]+|\d+|_+| ?[^\w\s]+|\s+(?!\S)|\s", text)

    @staticmethod
    def _merge(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
        merged, i = [], 0
        while i < len(word):
            if tuple(word[i : i + 2]) == pair:
                merged.append(new)
                i += 2
            else:
                merged.append(word[i])
                i += 1
        return merged

    def encode(self, text: str) -> np.ndarray:
        """The tokens of ``text``: in each word the earliest learnt merge goes first."""
        tokens: list[int] = []
        for piece in self.split(text):
            if piece not in self.known:
                word = list(piece.encode())
                while found := [pair for pair in zip(word, word[1:], strict=False) if pair in self.ranks]:
                    pair = min(found, key=self.ranks.__getitem__)
                    word = self._merge(word, pair, self.ranks[pair])
                self.known[piece] = word
            tokens += self.known[piece]
        return np.array(tokens, np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of ``tokens``, with a replacement character for bytes that are none."""
        return b"".join(self.pieces[t] for t in tokens).decode(errors="replace")


# The model: a causal transformer whose output layer is its embedding


def init(key: Array, log_frequency: ArrayLike) -> Params:
    """Random weights. The output bias starts at the tokens' log-frequencies, so that step 0 knows the unigram model."""
    keys = iter(jax.random.split(key, 2 + 4 * LAYERS))
    bias = jnp.asarray(log_frequency, jnp.float32)

    def normal(*shape: int, scale: float | None = None) -> Array:
        return jax.random.normal(next(keys), shape) * (shape[0] ** -0.5 if scale is None else scale)

    return {
        "embedding": normal(len(bias), WIDTH, scale=0.02),
        "position": normal(WINDOW, WIDTH, scale=0.1),
        "bias": bias,
        "layers": [
            {
                "qkv": normal(WIDTH, 3 * WIDTH),
                "out": normal(WIDTH, WIDTH) / LAYERS,
                "up": normal(WIDTH, 4 * WIDTH),
                "down": normal(4 * WIDTH, WIDTH) / LAYERS,
            }
            for _ in range(LAYERS)
        ],
    }


def normalize(x: Array) -> Array:
    """``x`` with a mean square of 1."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def dropout(x: Array, key: Array | None) -> Array:
    """``x`` with units zeroed at random; as it is without a key."""
    if key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - DROPOUT, x.shape), x / (1 - DROPOUT), 0)


def hidden_of(params: Params, tokens: Array, key: Array | None = None) -> Array:
    """Hidden states [B, T, WIDTH] of tokens [B, T]; with a ``key`` units are dropped, as for training."""
    keys = [None] * (2 * LAYERS + 2) if key is None else list(jax.random.split(key, 2 * LAYERS + 2))
    batch, length = tokens.shape
    x = normalize(params["embedding"][tokens]) + params["position"][:length]
    x = dropout(x, keys.pop())
    for layer in params["layers"]:
        q, k, v = jnp.split((normalize(x) @ layer["qkv"]).reshape(batch, length, HEADS, -1), 3, axis=-1)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(batch, length, WIDTH)
        x = x + dropout(attended @ layer["out"], keys.pop())
        x = x + dropout(jax.nn.gelu(normalize(x) @ layer["up"]) @ layer["down"], keys.pop())
    return dropout(normalize(x), keys.pop())


def logits_of(params: Params, hidden: Array, temperature: float = 1.0) -> jaxce.LinearLogits:
    """Logits [..., V] of each next token, from hidden states [..., WIDTH]."""
    embedding, bias = params["embedding"], params["bias"]
    return jaxce.LinearLogits(hidden, embedding, bias=bias, class_axis=0, temperature=temperature)


def losses_of(params: Params, tokens: Array) -> Array:
    """Negative log-likelihood of each token within tokens [B, T + 1] but the first, in nats: [B, T]."""
    logits = logits_of(params, hidden_of(params, tokens[:, :-1]))
    return jaxce.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def generate(params: Params, prompt: Array, key: Array | None = None, temperature: float = 1.0) -> Array:
    """A window of tokens, [WINDOW], that begins with ``prompt``: the likeliest ones, or with a ``key`` random ones."""

    def extend(i: Any, tokens: Array) -> Array:
        hidden = hidden_of(params, tokens[None])[0, i - 1]
        if key is None:
            token = jaxce.softmax_statistics(logits_of(params, hidden)).prediction
        else:
            logits = logits_of(params, hidden, temperature).materialize()
            token = jax.random.categorical(jax.random.fold_in(key, i), logits)
        return tokens.at[i].set(token.astype(tokens.dtype))

    tokens = jnp.zeros(WINDOW, jnp.int32).at[: len(prompt)].set(prompt)
    return jax.lax.fori_loop(len(prompt), WINDOW, extend, tokens)


# Training and judging


def mean_loss(params: Params, tokens: Array, key: Array) -> Array:
    """What is trained: the mean loss of tokens [B, T + 1], without ever having all logits in memory."""
    return jaxce.linear_cross_entropy(logits_of(params, hidden_of(params, tokens[:, :-1], key)), tokens[:, 1:])


def mean_loss_of_optax(params: Params, tokens: Array, key: Array) -> Array:
    """The same number from Optax's loss, which takes all logits as an array."""
    logits = logits_of(params, hidden_of(params, tokens[:, :-1], key)).materialize()
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def optimizer_of(options: argparse.Namespace) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine decay and clipped gradients."""
    warmup = min(50, options.steps // 5)
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, warmup, max(options.steps, warmup + 1))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.1))


def compile_step(loss: Callable[..., Array], params: Params, options: argparse.Namespace) -> Any:
    """A training step, compiled: (weights, optimizer's state, tokens, key) to weights, state and loss."""
    optimizer = optimizer_of(options)

    def step(params: Params, state: Any, tokens: Array, key: Array) -> tuple[Params, Any, Array]:
        value, gradients = jax.value_and_grad(loss)(params, tokens, key)
        updates, state = optimizer.update(gradients, state, params)
        return cast(Params, optax.apply_updates(params, updates)), state, value

    tokens = jax.ShapeDtypeStruct((options.batch, WINDOW + 1), jnp.int32)
    return jax.jit(step).lower(params, optimizer.init(params), tokens, jax.random.key(0)).compile()


def memory(ours: Any, peer: Any) -> str:
    """The temporary memory of two compiled training steps, as the compiler reports it."""
    a, b = (step.memory_analysis().temp_size_in_bytes for step in (ours, peer))
    return (
        f"temporary memory of a step: {a / 1e6:.1f} MB with jaxce.linear_cross_entropy, {b / 1e6:.1f} MB with Optax's loss "
        f"on all logits, so {abs(1 - a / b):.0%} {'less' if a <= b else 'more'}"
    )


def train(step: Any, params: Params, tokens: np.ndarray, options: argparse.Namespace) -> tuple[Params, list[float]]:
    """The weights after ``options.steps`` steps on random windows of ``tokens``, and the loss of each step."""
    rng, key = np.random.default_rng(options.seed), jax.random.key(options.seed + 1)
    state = optimizer_of(options).init(params)
    losses: list[float] = []
    every = max(1, options.steps // 10)
    start = time.perf_counter()
    print("training: step, mean loss since the last line in nats per token, seconds")
    print("  step    loss  seconds")
    for done in range(1, options.steps + 1):
        starts = rng.integers(len(tokens) - WINDOW, size=(options.batch, 1))
        batch = jnp.asarray(tokens[starts + np.arange(WINDOW + 1)])
        params, state, loss = step(params, state, batch, jax.random.fold_in(key, done))
        losses.append(float(loss))
        if done == 1 or done % every == 0 or done == options.steps:
            recent = losses[-((done - 1) % every + 1) :]
            print(f"{done:6d}  {np.mean(recent):6.3f}  {time.perf_counter() - start:7.1f}", flush=True)
    return params, losses


def held_out_windows(training: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Windows [N, WINDOW + 1] and which of their predictions count [N, WINDOW]: every held-out token exactly once.

    The windows overlap by half, and only the second half of a window counts, so that each prediction is made from at
    least half a window of what came before, at the start the end of the training text.
    """
    stride = WINDOW // 2
    count = -(-len(held_out) // stride)
    padding = np.zeros(count * stride - len(held_out), np.int32)
    stream = np.concatenate([training[-(WINDOW + 1 - stride) :], held_out, padding])
    where = np.zeros((count, WINDOW), bool)
    where[:, -stride:] = np.arange(count * stride).reshape(count, stride) < len(held_out)
    return stream[stride * np.arange(count)[:, None] + np.arange(WINDOW + 1)], where


def check_gradient(logits: np.ndarray, labels: np.ndarray) -> str:
    """The gradient of the mean loss, [N, V], in three ways: by formula, by ``jax.grad`` and by finite differences."""
    x, rows = logits.astype(np.float64), np.arange(len(labels))

    def loss(x: np.ndarray) -> np.ndarray:
        m = x.max(-1)
        return m + np.log(np.exp(x - m[:, None]).sum(-1)) - x[rows, labels]

    formula = np.exp(x - x.max(-1, keepdims=True))
    formula /= formula.sum(-1, keepdims=True)
    formula[rows, labels] -= 1
    formula /= len(labels)
    autodiff = jax.grad(
        lambda logits: jaxce.weighted_mean(jaxce.softmax_cross_entropy_with_integer_labels(logits, labels))
    )(jnp.asarray(logits))

    entries = np.concatenate([labels[:, None], np.argsort(-x)[:, :4]], axis=1)  # the label and the likeliest classes
    h, differences = 1e-4, []
    for entry in entries.T:
        shift = np.zeros_like(x)
        shift[rows, entry] = h
        difference = (loss(x + shift) - loss(x - shift)) / (2 * h * len(labels))
        differences.append(np.abs(difference - formula[rows, entry]).max())
    largest = np.abs(formula).max()
    error = np.abs(np.asarray(autodiff, np.float64) - formula).max()
    return (
        f"how exact the gradient of the mean loss is, on {len(x)} held-out tokens of {x.shape[1]} classes: largest\n"
        f"difference from (softmax - one-hot) / {len(x)} in float64, as a fraction of its largest entry\n"
        f"  {'jax.grad, float32':<48}{error / largest:12.1e}\n"
        f"  {'finite differences, float64, ' + str(entries.size) + ' entries':<48}{max(differences) / largest:12.1e}"
    )


def samples(params: Params, prompt: np.ndarray, tokenizer: Tokenizer, seed: int) -> str:
    """Text that the model writes after a prompt: always the likeliest token, and random ones."""
    write = jax.jit(generate, static_argnames="temperature")
    greedy = write(params, prompt)
    random = write(params, prompt, jax.random.key(seed), temperature=TEMPERATURE)
    texts = {
        "the held-out text that it continues": prompt,
        "the likeliest token each time": greedy[len(prompt) :],
        f"random tokens at temperature {TEMPERATURE}": random[len(prompt) :],
    }
    lines = [f"text that the trained model writes, {WINDOW - len(prompt)} tokens"]
    for title, tokens in texts.items():
        text = tokenizer.decode(np.asarray(tokens))
        lines += [f"  {title}", textwrap.indent(text, "  | ", lambda _: True)]
    return "\n".join(lines)


def plot(file: str, losses: list[float], unigram: float, held_out: float) -> None:
    """Draws the loss of each training step."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.8, label="training batches")
    axes.axhline(held_out, color="C1", label="held-out text, after training")
    axes.axhline(unigram, color="C2", linestyle="--", label="held-out text, token frequencies alone")
    title = "Cross-entropy of a small language model of Python's manual"
    axes.set(xlabel="training step", ylabel="mean loss (nats per token)", title=title)
    axes.margins(y=0.1)
    axes.legend()
    figure.savefig(file, dpi=200)


# The command line


class Parser(argparse.ArgumentParser):
    """A bad option gets one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and leaves with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def at_least(low: int) -> Callable[[str], int]:
    """An argparse type: the integers from ``low``."""

    def integer(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < low:
            raise argparse.ArgumentTypeError(f"must be an integer >= {low}, got {text!r}")
        return int(text)

    return integer


def positive(text: str) -> float:
    """An argparse type: the positive numbers."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked before any work is done."""
    parser = Parser(
        prog="python -m jaxce",
        description="Train a small language model on Python's own manual with jaxce's loss, measure how well it predicts "
        "text that it has not seen, and let it write.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    vocabulary = "number of different tokens: the 256 bytes and the most frequent pieces of words"
    parser.add_argument("--steps", type=at_least(1), default=200, help="number of training steps")
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="random seed for weights, batches, dropout and samples"
    )
    parser.add_argument("--vocabulary", type=at_least(256), default=4096, help=vocabulary)
    parser.add_argument("--batch", type=at_least(1), default=16, help=f"sequences of {WINDOW} tokens in each step")
    parser.add_argument("--learning-rate", type=positive, default=3e-3, help="peak learning rate of AdamW")
    parser.add_argument("--plot", metavar="FILE", help="save a picture of the training loss as FILE (needs matplotlib)")
    parser.add_argument("--version", action="version", version=f"jaxce {jaxce.__version__}")
    options = parser.parse_args(arguments)
    if options.plot is not None and (problem := cannot_plot(options.plot)):
        parser.error(f"argument --plot: {problem}")
    return options


def cannot_plot(file: str) -> str | None:
    """Why a picture can't be saved as ``file``, if it can't."""
    if importlib.util.find_spec("matplotlib") is None:
        return "needs matplotlib: pip install matplotlib"
    from matplotlib.backend_bases import FigureCanvasBase  # pyright: ignore[reportMissingImports]

    directory, (_, ending) = os.path.dirname(file), os.path.splitext(file)
    endings = sorted(FigureCanvasBase.get_supported_filetypes())
    if not os.path.isdir(directory or "."):
        return f"no such directory: {directory!r}"
    if os.path.isdir(file):
        return f"is a directory: {file!r}"
    if ending[1:].lower() not in endings:
        return f"must end in one of .{', .'.join(endings)}, got {file!r}"
    if not os.access(file if os.path.exists(file) else directory or ".", os.W_OK):
        return f"may not be written: {file!r}"
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demonstration. Ctrl-C, or a reader that has read enough (``| head``), ends it quietly."""
    options = parse(arguments)
    try:
        run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports that it can't flush
        sys.exit(141)  # 128 + SIGPIPE


def run(options: argparse.Namespace) -> None:
    """Trains, measures and prints."""
    device = jax.devices()[0]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "optax"))
    print(f"jaxce {jaxce.__version__}, {versions}, Python {platform.python_version()}")
    print(f"device: {jax.device_count()} x {device.platform} ({device.device_kind})", flush=True)
    training_text, held_out_text = load_text()
    tokenizer = Tokenizer(training_text, options.vocabulary)
    training, held_out = tokenizer.encode(training_text), tokenizer.encode(held_out_text)
    training_bytes, held_out_bytes = training_text.encode(), held_out_text.encode()
    print(f"text: {len(training_bytes)} bytes to train on, {len(held_out_bytes)} held out, of Python's own manual")
    print(f"tokens: {len(training)} and {len(held_out)}, of {len(tokenizer.pieces)} classes")

    counts = np.bincount(training, minlength=len(tokenizer.pieces)) + 1
    log_frequency = np.log(counts / counts.sum())
    print("compiling the training step, and for comparison the same step with Optax's loss ...", flush=True)
    params = jax.jit(init)(jax.random.key(options.seed), log_frequency)
    step = compile_step(mean_loss, params, options)
    print(memory(step, compile_step(mean_loss_of_optax, params, options)), flush=True)
    params, losses = train(step, params, training, options)

    windows, where = held_out_windows(training, held_out)
    judge = jax.jit(losses_of)
    nll = jaxce.weighted_mean(jnp.concatenate([judge(params, window[None]) for window in windows]), jnp.asarray(where))
    unigram = -log_frequency[held_out].mean()
    byte_counts = np.bincount(np.frombuffer(held_out_bytes, np.uint8))
    byte_frequency = byte_counts[byte_counts > 0] / len(held_out_bytes)
    byte_entropy = -np.sum(byte_frequency * np.log2(byte_frequency))
    compressed = len(zlib.compress(training_bytes + held_out_bytes, 9)) - len(zlib.compress(training_bytes, 9))

    def row(name: str, nats: Any) -> str:
        bits = jaxce.bits_per(nats * len(held_out), len(held_out_bytes))
        return f"  {name:<24}{float(nats):11.4f}{float(jaxce.perplexity(nats)):13.2f}{float(bits):12.4f}"

    print("how well held-out text is predicted, less is better")
    print("                            nats/token   perplexity   bits/byte")
    print(row("trained model", nll))
    print(row("token unigrams", unigram))
    print(f"  {'byte unigrams':<48}{byte_entropy:12.4f}")
    print(f"  {'zlib':<48}{8 * compressed / len(held_out_bytes):12.4f}")
    print("token unigrams: frequencies of (count + 1) in the training text")
    print("byte unigrams: the entropy of the held-out text's own byte frequencies")
    print("zlib: by how much the held-out text lengthens the compressed training text, level 9", flush=True)
    hidden = jax.jit(hidden_of)(params, jnp.asarray(windows[:1, :-1]))[0]
    print(check_gradient(np.asarray(logits_of(params, hidden).materialize()), windows[0, 1:]), flush=True)
    print(samples(params, held_out[:PROMPT], tokenizer, options.seed))
    if options.plot is not None:
        plot(options.plot, losses, float(unigram), float(nll))
        print(f"picture of the training loss: {options.plot}")


if __name__ == "__main__":
    main()
