"""``python -m jaxce``: that it runs, and that what it prints is true."""

from __future__ import annotations

import collections
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxce.__main__ import (
    PROMPT,
    WINDOW,
    Params,
    Tokenizer,
    generate,
    held_out_windows,
    hidden_of,
    init,
    load_text,
    logits_of,
    main,
    mean_loss,
    mean_loss_of_optax,
)

ROOT = Path(__file__).parents[1]
VOCABULARY = 700


QUICKLY = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}


def demo(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxce", *options]
    return subprocess.run(command, cwd=ROOT, env=QUICKLY, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def output() -> str:
    result = demo("--steps", "5", "--vocabulary", str(VOCABULARY), "--batch", "2", "--seed", "3")
    assert result.returncode == 0, result.stderr
    return result.stdout


def numbers(output: str, name: str) -> list[float]:
    """The numbers in the line of the output that starts with ``name``."""
    (line,) = re.findall(rf"^ *{re.escape(name)}  +(.*)$", output, re.M)
    return [float(number) for number in line.split()]


def manual() -> tuple[str, str]:
    """The text as the demonstration's documentation describes it: each paragraph once, nine tenths to train on."""
    topics = importlib.import_module("pydoc_data.topics").topics
    seen: list[str] = []
    for paragraph in "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n"):
        if paragraph not in seen:
            seen.append(paragraph)
    text = "\n\n".join(seen)
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


def test_the_text_is_the_manual() -> None:
    assert load_text() == manual()


def test_held_out_paragraphs_are_new() -> None:
    training, held_out = load_text()
    assert not set(training.split("\n\n")) & set(held_out.split("\n\n"))


def test_shows_progress(output: str) -> None:
    steps = re.findall(r"^ +(\d+) +(\d+\.\d+) +\d+\.\d$", output, re.M)
    assert [int(step) for step, _ in steps] == [1, 2, 3, 4, 5]
    assert all(0 < float(loss) < 2 * math.log(VOCABULARY) for _, loss in steps)


def test_zlib(output: str) -> None:
    training, held_out = (part.encode() for part in manual())
    bits = 8 * (len(zlib.compress(training + held_out, 9)) - len(zlib.compress(training, 9))) / len(held_out)
    assert numbers(output, "zlib") == [pytest.approx(bits, abs=6e-5)]


def test_byte_unigrams(output: str) -> None:
    held_out = manual()[1].encode()
    frequencies = [count / len(held_out) for count in collections.Counter(held_out).values()]
    entropy = -math.fsum(f * math.log2(f) for f in frequencies)
    assert numbers(output, "byte unigrams") == [pytest.approx(entropy, abs=6e-5)]


def test_token_unigrams(output: str) -> None:
    training_text, held_out_text = manual()
    tokenizer = Tokenizer(training_text, VOCABULARY)
    counts = collections.Counter(tokenizer.encode(training_text).tolist())
    total = sum(counts.values()) + VOCABULARY
    held_out = tokenizer.encode(held_out_text).tolist()
    nats = math.fsum(math.log(total / (counts[token] + 1)) for token in held_out)
    expected = [nats / len(held_out), math.exp(nats / len(held_out)), nats / math.log(2) / len(held_out_text.encode())]
    assert numbers(output, "token unigrams") == pytest.approx(expected, rel=1e-4)


def test_trained_model(output: str) -> None:
    nats, perplexity, bits = numbers(output, "trained model")
    found = re.search(r"^tokens: \d+ and (\d+), of (\d+) classes$", output, re.M)
    assert found is not None and int(found[2]) == VOCABULARY
    assert perplexity == pytest.approx(math.exp(nats), rel=1e-4)
    assert bits == pytest.approx(nats * int(found[1]) / math.log(2) / len(manual()[1].encode()), rel=1e-4)
    unigram = numbers(output, "token unigrams")[0]
    assert 0.8 * unigram < nats < 1.1 * unigram, "five steps from the unigram model"


def test_gradient_check(output: str) -> None:
    (autodiff,) = numbers(output, "jax.grad, float32")
    assert 0 <= autodiff < 1e-6
    (differences,) = numbers(output, f"finite differences, float64, {5 * WINDOW} entries")
    assert 0 < differences < 1e-7


def test_memory(output: str) -> None:
    before, _, after = output.partition("temporary memory of a step: ")
    assert "compiling the training step" in before and "compiling" not in after
    found = re.match(
        r"(.*) MB with jaxce.linear_cross_entropy, (.*) MB with Optax's loss .*, so (.*)% (less|more)", after
    )
    assert found is not None
    ours, peer, percent = map(float, found.groups()[:3])
    rounding = 0.05 / peer * (1 + ours / peer) + 0.005
    assert ours / peer == pytest.approx(1 - percent / 100 if found[4] == "less" else 1 + percent / 100, abs=rounding)


@pytest.fixture
def promotion_as_users_have_it() -> Iterator[None]:
    import jax

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def params() -> Params:
    """Random weights of a model of 50 tokens."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    like = jax.eval_shape(init, jax.random.key(0), np.zeros(50))
    return jax.tree.map(lambda x: jax.device_put(0.1 * rng.normal(size=x.shape).astype(x.dtype)), like)


@pytest.mark.usefixtures("promotion_as_users_have_it")
def test_both_losses_are_the_same_number(params: Params) -> None:
    import jax

    key = jax.random.key(1)
    tokens = jax.random.randint(key, (2, WINDOW + 1), 0, 50)
    both = jax.jit(lambda *batch: (mean_loss(*batch), mean_loss_of_optax(*batch)))
    ours, peer = both(params, tokens, key)
    assert ours == pytest.approx(float(peer), 1e-6)


def test_samples(output: str) -> None:
    """A prompt from the held-out text, and two continuations of it; with the same options the same ones."""
    _, _, text = output.partition(f"text that the trained model writes, {WINDOW - PROMPT} tokens\n")
    titles = re.findall(r"^  (?!\|)(.*)$", text, re.M)
    assert titles == [
        "the held-out text that it continues",
        "the likeliest token each time",
        "random tokens at temperature 0.8",
    ]
    prompt, greedy, random = (
        "\n".join(line[4:] for line in part.splitlines()) for part in re.findall(r"(?:^  \|.*\n?)+", text, re.M)
    )
    training, held_out = manual()
    tokenizer = Tokenizer(training, VOCABULARY)
    assert prompt == tokenizer.decode(tokenizer.encode(held_out)[:PROMPT]).rstrip(" ") and greedy and random != greedy


@pytest.mark.usefixtures("promotion_as_users_have_it")
def test_generated_tokens_are_the_likeliest_after_what_precedes(params: Params) -> None:
    import jax
    import jax.numpy as jnp

    prompt, write = jnp.arange(5, dtype=jnp.int32), jax.jit(generate)
    tokens = write(params, prompt)
    logits = jax.jit(lambda tokens: logits_of(params, hidden_of(params, tokens)[0]).materialize())(tokens[None])
    assert tokens[:5].tolist() == [0, 1, 2, 3, 4]
    assert tokens[5:].tolist() == jnp.argmax(logits, -1)[4:-1].tolist()
    cold, again = (write(params, prompt, jax.random.key(k), 1e-4) for k in (0, 1))
    assert cold.tolist() == again.tolist() == tokens.tolist()
    hot, same, other = (write(params, prompt, jax.random.key(k), 1.0).tolist() for k in (0, 0, 1))
    assert hot == same != other


def test_names_device_and_versions(output: str) -> None:
    import jax

    assert f"jax {jax.__version__}," in output and f"Python {sys.version.split()[0]}" in output
    assert re.search(r"^device: \d+ x cpu", output, re.M)


@pytest.mark.parametrize("text", ["", "plain words", "naïve \t café — 数\n\n   x_1=2**10  \r\n", "\N{BAT} " * 3])
def test_tokens_hold_every_text(text: str) -> None:
    tokenizer = Tokenizer(manual()[1], 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_merges_are_the_most_frequent_pairs() -> None:
    tokenizer = Tokenizer("abab abab cd", 258)
    assert tokenizer.pieces[256:] == [b"ab", b"abab"]
    assert [tokenizer.pieces[token] for token in tokenizer.encode("abab ab")] == [b"abab", b" ", b"ab"]


@pytest.mark.parametrize("length", [1, WINDOW // 2, WINDOW, 3 * WINDOW + 5])
def test_every_held_out_token_counts_once(length: int) -> None:
    import numpy as np

    training, held_out = np.arange(1000, 1000 + 2 * WINDOW), np.arange(length)
    windows, where = held_out_windows(training, held_out)
    assert windows[:, 1:][where].tolist() == held_out.tolist()
    stream = [*training.tolist(), *held_out.tolist()]
    for window, counted in zip(windows, where, strict=True):
        first = stream.index(window[0])
        real = int(np.flatnonzero(counted)[-1]) + 2
        assert window[:real].tolist() == stream[first : first + real]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--help"])
    assert raised.value.code == 0
    output = capsys.readouterr().out
    for option in ["--steps", "--seed", "--vocabulary", "--batch", "--learning-rate", "--plot"]:
        assert option in output


@pytest.mark.parametrize(
    "options",
    [
        ("--steps", "-3"),
        ("--steps", "0"),
        ("--steps", "many"),
        ("--seed", "-1"),
        ("--vocabulary", "255"),
        ("--batch", "1.5"),
        ("--learning-rate", "0"),
        ("--learning-rate", "nan"),
        ("--plot", "/no/such/directory/loss.png"),
        ("--plot", "/tmp"),
        ("--plot", "loss"),
        ("--plot", "loss.nothing"),
        ("--epochs", "3"),
    ],
    ids=" ".join,
)
def test_a_bad_option_gets_one_line(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(options)
    assert raised.value.code == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert re.fullmatch(rf"python -m jaxce: error: .*{re.escape(options[0])}.*\n", captured.err)


def test_a_bad_option_ends_the_program() -> None:
    result = demo("--steps", "-3")
    assert result.returncode == 2
    assert result.stderr == "python -m jaxce: error: argument --steps: must be an integer >= 1, got '-3'\n"


@pytest.mark.parametrize(("ended", "code"), [("by its reader", 141), ("by Ctrl-C", 130)])
def test_ends_quietly(ended: str, code: int) -> None:
    # A shell has the programs that it starts in the background ignore Ctrl-C.
    heeding = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{heeding}; runpy.run_module('jaxce', run_name='__main__')"]
    with subprocess.Popen(
        command, cwd=ROOT, env=QUICKLY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        assert run.stdout.readline().startswith("jaxce ")
        if ended == "by Ctrl-C":
            run.send_signal(signal.SIGINT)
        else:
            run.stdout.close()
        assert run.wait(timeout=120) == code
        assert run.stderr.read() == ""


@pytest.mark.slow
def test_plot(tmp_path: Path) -> None:
    file = tmp_path / "loss.png"
    result = demo("--steps", "2", "--vocabulary", "256", "--batch", "1", "--plot", str(file))
    if importlib.util.find_spec("matplotlib") is None:
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == "python -m jaxce: error: argument --plot: needs matplotlib: pip install matplotlib\n"
    else:
        assert result.returncode == 0, result.stderr
        assert file.read_bytes().startswith(b"\x89PNG")
