"""Directives -> changes of a document: merging (RFC 7386) and patches (RFC 6902), in place and each all or nothing.

The document is changed where a directive says, and nowhere else is it copied or even visited: a directive costs what it
changes, however large the document has become.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import jsonpatch
import orjson
from jsonpointer import JsonPointer, JsonPointerException

from runner.request.document import MAX_DEPTH

if TYPE_CHECKING:
    from collections.abc import Callable

#: Roots that are the runner's alone, and the one where others may add (DESIGN.md 5.6).
UNTOUCHABLE = frozenset({"runner", "asset"})
ADD_ONLY = "studioml"
_NEED_VALUE = {"add", "replace", "test"}
_NEED_FROM = {"move", "copy"}
_OPS = _NEED_VALUE | _NEED_FROM | {"remove"}


class BadDirective(ValueError):  # noqa: N818 - named as those in runner.errors
    """A directive that cannot or must not be applied. The document is as it was before."""


def merged(target: Any, patch: Any) -> Any:
    """RFC 7386: the result of merging `patch` into `target`, which is changed in place where it is an object."""
    if not isinstance(patch, dict):
        return patch
    result = target if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def apply_merge(document: dict[str, Any], directive: dict[str, Any]) -> None:
    """Merge a workload's object into the document. Raises BadDirective when it would change what is not its own."""
    _check_roots(document, directive, null_deletes=True)
    merged(document, directive)


def apply_patch(document: dict[str, Any], operations: list[Any], *, room: int) -> int:
    """Apply a workload's patch to the document; its copies may take `room` bytes, and how many they took is returned.

    Raises BadDirective when an operation fails or would change what is not its own; the document is then as it was.
    """
    copied = 0
    undo: list[Callable[[], None]] = []
    try:
        for operation in operations:
            pointer, source = _pointers(operation)
            copied += _check(document, operation, pointer, source, room - copied)
            # A single operation changes all or nothing by itself, but for a move.
            if len(operations) > 1 or operation["op"] == "move":
                undo += _snapshots(document, operation["op"], pointer, source)
            _apply(document, operation, pointer, source)
    except (jsonpatch.JsonPatchException, JsonPointerException, LookupError, TypeError, ValueError) as bad:
        for restore in reversed(undo):
            restore()
        if isinstance(bad, BadDirective):
            raise
        # Without the library's text, which quotes the document.
        raise BadDirective(f"the patch does not apply: {type(bad).__name__}") from bad
    return copied


def _pointers(operation: Any) -> tuple[JsonPointer, JsonPointer | None]:
    """Where the operation goes, and where it takes from. Raises BadDirective unless it is well-formed."""
    if not isinstance(operation, dict) or operation.get("op") not in _OPS:
        raise BadDirective("no operation of RFC 6902")
    op, path, source = operation["op"], operation.get("path"), operation.get("from")
    if not isinstance(path, str) or (op in _NEED_VALUE and "value" not in operation):
        raise BadDirective(f"{op} without a path or value")
    if op not in _NEED_FROM:
        return JsonPointer(path), None
    if not isinstance(source, str):
        raise BadDirective(f"{op} without a from")
    return JsonPointer(path), JsonPointer(source)


def _check(
    document: dict[str, Any],
    operation: dict[str, Any],
    pointer: JsonPointer,
    source: JsonPointer | None,
    room: int,
) -> int:
    """Whether the operation may be applied now; how many bytes it copies. Raises BadDirective."""
    op = operation["op"]
    if op == "test":
        return 0
    if op == "move":
        assert source is not None
        _check_takes(source.parts)
    value = operation["value"] if source is None and op != "remove" else None
    if source is not None:
        value = source.resolve(document)
    copied = len(orjson.dumps(value)) if op == "copy" else 0
    if copied > room:
        raise BadDirective("the document would become too large")
    if len(pointer.parts) + _depth(value) > MAX_DEPTH:
        raise BadDirective("the document would become too deep")
    if not pointer.parts:
        if op == "remove" or not isinstance(value, dict):
            raise BadDirective("the document has to stay an object")
        _check_roots(document, value, null_deletes=False)
    elif op in ("remove", "replace"):
        _check_takes(pointer.parts)
    else:
        _check_adds(document, pointer)
    return copied


def _check_takes(parts: list[str]) -> None:
    if parts and (parts[0] in UNTOUCHABLE or parts[0] == ADD_ONLY):
        raise BadDirective(f"{parts[0]} is the runner's")
    if not parts:
        raise BadDirective("the document has to stay an object")


def _check_adds(document: dict[str, Any], pointer: JsonPointer) -> None:
    if pointer.parts[0] in UNTOUCHABLE:
        raise BadDirective(f"{pointer.parts[0]} is the runner's")
    if pointer.parts[0] == ADD_ONLY:
        parent = _parent(document, pointer)
        if isinstance(parent, dict) and pointer.parts[-1] in parent:
            raise BadDirective(f"members of {ADD_ONLY} do not change")


def _check_roots(document: dict[str, Any], roots: dict[str, Any], *, null_deletes: bool) -> None:
    """Roots to be merged into the document leave the runner's own as they are."""
    for name in UNTOUCHABLE & roots.keys():
        raise BadDirective(f"{name} is the runner's")
    if ADD_ONLY in roots and not _only_adds(document.get(ADD_ONLY), roots[ADD_ONLY], null_deletes):
        raise BadDirective(f"members of {ADD_ONLY} do not change")


def _only_adds(present: Any, wanted: Any, null_deletes: bool) -> bool:
    """Whether merging leaves every present member as it is; saying it again with the same value changes nothing."""
    if not isinstance(present, dict) or not isinstance(wanted, dict):
        return type(present) is type(wanted) and bool(present == wanted)
    return all(
        _only_adds(present[name], value, null_deletes) if name in present else True
        for name, value in wanted.items()
        if value is not None or not null_deletes or name in present
    )


def _apply(
    document: dict[str, Any], operation: dict[str, Any], pointer: JsonPointer, source: JsonPointer | None
) -> None:
    if pointer.parts or operation["op"] == "test":
        jsonpatch.JsonPatch([operation]).apply(document, in_place=True)
        return
    # The whole document is replaced: the runner's roots stay, and what is new for `studioml` is added.
    roots = copy.deepcopy(operation["value"] if source is None else source.resolve(document))
    added = roots.pop(ADD_ONLY, None)
    for name in [name for name in document if name not in UNTOUCHABLE and name != ADD_ONLY]:
        del document[name]
    document.update(roots)
    if added:  # into a copy: what undoes this keeps the old one
        document[ADD_ONLY] = merged(copy.deepcopy(document[ADD_ONLY]), added)


def _snapshots(
    document: dict[str, Any], op: str, pointer: JsonPointer, source: JsonPointer | None
) -> list[Callable[[], None]]:
    """What puts the containers back that the operation changes."""
    places = [] if op == "test" else [pointer]
    if op == "move" and source is not None:
        places.append(source)
    containers = [_parent(document, place) if place.parts else document for place in places]
    return [_snapshot(container) for container in containers if isinstance(container, dict | list)]


def _snapshot(container: dict[str, Any] | list[Any]) -> Callable[[], None]:
    if isinstance(container, list):
        items = container.copy()

        def restore_items() -> None:
            container[:] = items

        return restore_items
    members = container.copy()

    def restore_members() -> None:
        container.clear()
        container.update(members)

    return restore_members


def _parent(document: dict[str, Any], pointer: JsonPointer) -> Any:
    """What holds the place that a pointer points to. Raises JsonPointerException when there is no such thing."""
    return pointer.to_last(document)[0]


def _depth(value: Any) -> int:
    """How many levels of containers there are in a value."""
    depth, level = 0, [value]
    while level := [inner for inner in level if isinstance(inner, dict | list)]:
        depth += 1
        level = [
            member for inner in level for member in (inner.values() if isinstance(inner, dict) else inner)
        ]
    return depth
