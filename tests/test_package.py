"""The package as a package: what is installed, its version, its types, and public objects that pickle."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import pickle
import re
import tomllib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxce
from jaxce import __main__ as demonstration

ROOT = Path(__file__).parents[1]
METRICS = [value for _, value in inspect.getmembers(jaxce.metrics, inspect.isclass) if hasattr(value, "from_batch")]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        demonstration.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"jaxce {jaxce.__version__}\n"
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", changelog, re.M)[0] == jaxce.__version__
    cited = re.findall(r"^ *version += \{(.+)\}", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert cited == [jaxce.__version__]


def test_what_is_installed() -> None:
    distribution = importlib.metadata.distribution("jaxce")
    if json.loads(distribution.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"):
        pytest.skip("an editable install has no files of its own")
    files = {
        str(path) for path in distribution.files or [] if ".dist-info" not in path.parts[0] and path.suffix != ".pyc"
    }
    assert not re.findall(r"\]\((?!https?://)", str(distribution.metadata["Description"])), "a link that leads nowhere"
    assert files == {f"jaxce/{path.name}" for path in (ROOT / "jaxce").iterdir() if path.suffix in (".py", ".typed")}


def test_the_source_has_what_it_is_tested_with() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert all((ROOT / name).exists() for name in included)
    assert {"jaxce", "tests", "notebooks", "README.md", "pyproject.toml"} <= set(included)
    assert (ROOT / "jaxce" / "py.typed").read_bytes() == b""


@pytest.mark.parametrize("name", jaxce.__all__)
def test_public_names_pickle(name: str) -> None:
    public = getattr(jaxce, name)
    assert pickle.loads(pickle.dumps(public)) is public


def test_values_pickle() -> None:
    logits, labels = jnp.eye(3), jnp.array([0, 1, 1])
    linear = pickle.loads(pickle.dumps(jaxce.LinearLogits(logits, logits, temperature=2.0, block_size=2)))
    assert (linear.temperature, linear.block_size) == (2.0, 2)
    np.testing.assert_array_equal(linear.materialize(), logits / 2)
    sharded = pickle.loads(pickle.dumps(jaxce.ShardedLogits(logits, axis_name="model")))
    assert sharded.axis_name == "model"
    statistics = jaxce.softmax_statistics(logits, labels)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(statistics)).nll, statistics.nll)
    evaluation = jaxce.metrics.Evaluation.from_batch(logits, labels, k=2)
    assert pickle.loads(pickle.dumps(evaluation)).compute().nll == evaluation.compute().nll
    assert len(METRICS) > 5 and all(pickle.loads(pickle.dumps(metric)) is metric for metric in METRICS)
