"""Makes the tables of docs/reference.md from code, for `make configs`: request fields, limits and metrics."""

from __future__ import annotations

from gptj_triton.engine.metrics import METRICS, PREFIX, Metric
from gptj_triton.fields import BY_NAME, Field
from gptj_triton.limits import LIMITS

TYPES = {"BYTES": "string", "INT32": "int32", "UINT64": "uint64", "FP32": "float", "BOOL": "bool"}


def with_tables(document: str) -> str:
    """`document` with the tables of today between their markers, `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""
    for name, table in (("fields", fields_table()), ("limits", limits_table()), ("metrics", metrics_table())):
        document = _between(name, table, document)
    return document


def fields_table() -> str:
    """A row for each field of the ensemble, in Markdown."""
    rows = ["| field | type | default | range | meaning |", "| --- | --- | --- | --- | --- |"]
    rows += [
        f"| `{name}` | {_type(field)} | {field.default_in_words} | {_range(field)} | {field.help} |"
        for name, field in BY_NAME.items()
    ]
    return "\n".join(rows) + "\n"


def limits_table() -> str:
    """A row for each limit of a request, in Markdown."""
    rows = ["| limit | default | the most |", "| --- | --- | --- |"]
    rows += [f"| `{name}` | {field.default:,} | {field.metadata['meaning']} |" for name, field in LIMITS.items()]
    return "\n".join(rows) + "\n"


def metrics_table() -> str:
    """A row for each metric, in Markdown."""
    rows = ["| metric | kind | meaning | TensorRT-LLM's name |", "| --- | --- | --- | --- |"]
    rows += [
        f"| `{PREFIX}{name}`{_label(metric)} | {metric.kind} | {metric.help} | {_twin(metric)} |"
        for name, metric in METRICS.items()
    ]
    return "\n".join(rows) + "\n"


def _label(metric: Metric) -> str:
    values = ", ".join(f"`{value}`" for value in metric.values)
    return f" by `{metric.label}`: {values}" if metric.label else ""


def _twin(metric: Metric) -> str:
    twin = metric.twin
    return f'`{twin.family}{{{twin.label}="{twin.value}"}}`' if twin else ""


def _between(name: str, table: str, document: str) -> str:
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, rest = document.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}{table}{end}{after}"


def _range(field: Field) -> str:
    return "see [limits](#limits)" if field.many else field.range() or "any"


def _type(field: Field) -> str:
    return f"list of {TYPES[field.dtype]}s" if field.many else TYPES[field.dtype]
