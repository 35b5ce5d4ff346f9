"""Write the reference pages that are generated from the code: settings, manifests and results.

mkdocs runs this script when it builds the site; the pages exist only there.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import mkdocs_gen_files
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from capgap.schemas import (
    benchmark,
    facts,
    law,
    law_curve,
    law_fit,
    law_frontier,
    law_prediction,
    law_regret,
    law_shared,
    manifest,
    results,
)
from capgap.schemas.base import OPERATIONAL
from capgap.schemas.run_file import RunFile

(_MARK,) = OPERATIONAL


def settings_pages() -> Iterator[tuple[str, str]]:
    """Yield path and text of the index of settings and of a page for each section of the run file."""
    pages: dict[str, list[tuple[str, type[BaseModel]]]] = {}
    for name, model in _sections("", RunFile):
        pages.setdefault(name.partition(".")[0], []).append((name, model))
    lines = [
        "# Settings",
        "",
        "Every key of a run file. Each is a flag too: `--train.learning_rate 1e-4`. A setting marked *operational* "
        "affects how a stage works but not its result: changing it makes nothing stale.",
        "",
        "| section | what it is |",
        "|---|---|",
        *(f"| [`{name}`](settings/{name}.md) | {_sentence(found[0][1])} |" for name, found in pages.items() if name),
        "",
        "## Outside of the sections",
        "",
        *_table(RunFile),
        "",
        "## All settings by name",
        "",
        "Find a setting here with your browser's search, or find its page with the search of this site.",
        "",
    ]
    for name, found in pages.items():
        links = (
            f"[`{inner}.{field}`](settings/{name}.md#{_anchor(inner)})"
            for inner, model in found
            if name
            for field in model.model_fields
        )
        lines += [" &middot; ".join(links), ""]
        if name:
            yield f"reference/settings/{name}.md", _section_page(name, found)
    yield "reference/settings.md", "\n".join(lines) + "\n"


def _section_page(name: str, found: list[tuple[str, type[BaseModel]]]) -> str:
    lines = [f"# Settings of `{name}`", "", "[All settings](../settings.md)"]
    for inner, model in found:
        lines += ["", f"## {inner} {{#{_anchor(inner)}}}", "", _sentence(model), "", *_table(model)]
    return "\n".join(lines) + "\n"


def _anchor(name: str) -> str:
    return name.replace(".", "-").replace("_", "-")


def records_page() -> str:
    """Return the page of manifests, facts, results, the law's table and fit."""
    lines = ["# Manifests and results", "", "For programs that read the JSON files of stages: their fields."]
    laws = (law, law_fit, law_curve, law_prediction, law_frontier, law_regret, law_shared)
    for module in (manifest, facts, results, benchmark, *laws):
        lines += ["", f"## {module.__name__.removeprefix('capgap.')}", "", (module.__doc__ or "").strip()]
        for model in vars(module).values():
            if isinstance(model, type) and issubclass(model, BaseModel) and model.__module__ == module.__name__:
                lines += ["", f"### {model.__name__}", "", _sentence(model), "", *_table(model)]
    return "\n".join(lines) + "\n"


def _sections(name: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the model and the models of its fields, each with its dotted key in the run file."""
    yield name, model
    for field, info in model.model_fields.items():
        for inner in _models_in(info.annotation):
            yield from _sections(f"{name}.{field}".lstrip("."), inner)


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _models_in(part)


def _table(model: type[BaseModel]) -> list[str]:
    rows = [_row(name, info) for name, info in model.model_fields.items()]
    # two columns, which a phone has room for
    return ["| name, type, default | what it is |", "|---|---|", *rows] if rows else []


def _row(name: str, info: FieldInfo) -> str:
    extra = info.json_schema_extra
    operational = " *operational*" if isinstance(extra, dict) and extra.get(_MARK) else ""
    first = "<br>".join(filter(None, (f"`{name}`", _type(info), _default(info))))
    cells = (first, f"{_one_line(info.description or '')}{operational}")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(info: FieldInfo) -> str:
    kinds = " or ".join(f"`{kind}`" for kind in _kinds(info.annotation))
    bounds = [f"{word} {getattr(m, key)}" for m in info.metadata for key, word in _BOUNDS.items() if hasattr(m, key)]
    return ", ".join([kinds, *bounds])


def _kinds(annotation: Any) -> list[str]:
    """Return each type or value that a setting may have by itself, so that a narrow column can break between them."""
    if get_origin(annotation) in (Union, UnionType):
        return [kind for one in get_args(annotation) for kind in _kinds(one)]
    if get_origin(annotation) is Literal:
        return [repr(value) for value in get_args(annotation)]
    if annotation is NoneType:
        return ["None"]
    plain = isinstance(annotation, type) and get_origin(annotation) is None
    return [annotation.__name__ if plain else _without_modules(str(annotation).replace("typing.", ""))]


_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def _without_modules(text: str) -> str:
    words = []
    for word in text.replace("[", " [ ").replace("]", " ] ").replace(",", " , ").split():
        words.append(word.rsplit(".", 1)[-1] if word.startswith("capgap.") else word)
    return " ".join(words).replace(" [ ", "[").replace(" ]", "]").replace(" ,", ",")


def _default(info: FieldInfo) -> str:
    if info.default_factory is not None:
        return ""
    return "**needed**" if info.default is PydanticUndefined else f"default `{info.default!r}`"


def _sentence(model: type[BaseModel]) -> str:
    return _one_line(model.__doc__ or "")


def _one_line(text: str) -> str:
    return " ".join(text.split())


for path, text in (*settings_pages(), ("reference/manifests.md", records_page())):
    with mkdocs_gen_files.open(path, "w") as page:
        page.write(text)
