"""The table of request fields in docs/reference.md, made from the one in fields.py and written by `make configs`."""

from __future__ import annotations

from gptj_triton.fields import BY_NAME, Field

BEGIN, END = "<!-- fields: begin -->\n", "<!-- fields: end -->\n"
TYPES = {"BYTES": "string", "INT32": "int32", "UINT64": "uint64", "FP32": "float", "BOOL": "bool"}


def with_fields(document: str) -> str:
    """`document` with the table of today between its markers."""
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{fields_table()}{END}{after}"


def fields_table() -> str:
    """A row for each field of the ensemble, in Markdown."""
    rows = ["| field | type | default | range | meaning |", "| --- | --- | --- | --- | --- |"]
    rows += [
        f"| `{name}` | {_type(field)} | {field.default_in_words} | {field.range() or 'any'} | {field.help} |"
        for name, field in BY_NAME.items()
    ]
    return "\n".join(rows) + "\n"


def _type(field: Field) -> str:
    return f"list of {TYPES[field.dtype]}s" if field.many else TYPES[field.dtype]
