"""What makes the library's own types arguments and results of programs that `jax.export` writes down."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

from jax import export

from jaxce import metrics
from jaxce._logits import LinearLogits, ShardedLogits
from jaxce._statistics import SoftmaxStatistics


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _register(cls: type, static: Callable[[Any], Any] = lambda static: static) -> None:
    """``static`` makes what isn't an array in an object again of plain tuples."""
    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jaxce.{cls.__name__}",
        serialize_auxdata=lambda value: json.dumps(value).encode(),
        deserialize_auxdata=lambda data: static(_tuples(json.loads(data))),
    )


export.register_namedtuple_serialization(SoftmaxStatistics, serialized_name="jaxce.SoftmaxStatistics")
_register(LinearLogits)
_register(ShardedLogits)
_register(metrics.Sum)
_register(metrics.Evaluation, lambda static: (metrics._Options(*static[0]),))
for _name, _cls in vars(metrics).items():
    if inspect.isclass(_cls) and issubclass(_cls, metrics.Metric) and not _name.startswith("_"):
        if _cls not in (metrics.Metric, metrics.Evaluation):
            _register(_cls)
