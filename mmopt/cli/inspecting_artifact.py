"""What ``mmopt inspect`` says about an artifact."""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from mmopt.cli.output import Output, size_text, table
from mmopt.runtime.artifact import EntryPoint
from mmopt.runtime.store import Store, open_store


def inspect_artifact(path: pathlib.Path, show: Output) -> None:
    """Print and write what the artifact at ``path`` holds. Nothing of it is run.

    Raises:
        LoadError: It is not an artifact, or a damaged one.
    """
    store = open_store(path)
    manifest = store.manifest
    store.verify(manifest.files)
    for number, choice in enumerate(manifest.each()):
        start = f"artifact {path}, for" if not number else "or, where that does not run, for"
        show.result(f"{start} {_target(choice.target)}")
    for entry in manifest.entries.values():
        show.result("")
        _entry(entry, show)
    if manifest.notes:
        show.result("\nnotes:")
        for note in manifest.notes:
            show.result(f"  {note}")
    templates = collections.Counter(str(kernel.get("template", "?")) for kernel in manifest.kernels)
    show.result("")
    show.result(table(("kernel template", "kernels"), templates.most_common()))
    if show.verbose:
        names = sorted({key for kernel in manifest.kernels for key in kernel})
        show.result(table(names, [[kernel.get(key, "") for key in names] for kernel in manifest.kernels]))
    show.result("")
    show.result(table(("file", "size"), [(name, size_text(record.size)) for name, record in manifest.files.items()]))
    show.result(f"\nverified: {_verdict(store)}; hashes of all files are right")
    show.result("made with " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    show.json({"path": str(path), **manifest.to_json(), "verify": _json(store, "verify.json")})


def _target(target: Mapping[str, Any]) -> str:
    return f"{target.get('name', '?')} ({' '.join((target.get('triple', '?'), *target.get('features', ())))})"


def _entry(entry: EntryPoint, show: Output) -> None:
    rows = [("input", spec.name, str(spec)) for spec in entry.inputs]
    rows += [("output", spec.name, str(spec)) for spec in entry.outputs]
    show.result(table((f"entry point {entry.name}", "name", "type"), rows))
    kinds = collections.Counter(segment.kind for segment in entry.segments)
    weights = sum(len(segment.params) for segment in entry.segments)
    show.result(f"runs as {', '.join(f'{count} {kind}' for kind, count in kinds.items())}; {weights} weights")


def _json(store: Store, name: str) -> Any:
    if name not in store.manifest.files:
        return None
    extent = store.extent(name)
    with extent.path.open("rb") as file:
        file.seek(extent.offset)
        return json.loads(file.read(extent.size))


def _verdict(store: Store) -> str:
    found = _json(store, "verify.json")
    if found is None:
        return "no"
    if found["ok"] is None:
        return str(found["unverified"])
    worst = max((entry["max_relative_error"] or 0.0 for entry in found["entries"].values()), default=0.0)
    verdict = "yes" if found["ok"] else "it DISAGREES with its model"
    return f"{verdict}, largest error {worst:.2g} of an output's range over {len(found['entries'])} entry points"
