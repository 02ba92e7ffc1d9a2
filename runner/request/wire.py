"""The message as it is on the wire (INTEROP.md 1.2-1.5): which members there are, and how each may be written.

Every member is optional. One that cannot be coerced is None, with a note that says so: an odd member is never a reason to
fail by itself (DESIGN.md 5.7). Names match exactly first, then in any case, as Go's `encoding/json` does.
"""
# ruff: noqa: N815 - the members are called what the wire calls them

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, WrapValidator
from pydantic import ValidatorFunctionWrapHandler as Handler

from runner import units


@dataclasses.dataclass(frozen=True)
class Notes:
    """What was coerced or ignored while reading, a sentence each; `where` is the object being read. Never a secret."""

    where: str = ""
    lines: list[str] = dataclasses.field(default_factory=list)

    def add(self, member: str, what: str) -> None:
        """Note something about a member of the present object."""
        self.lines.append(f"{self.where}.{member} {what}" if self.where else f"{member} {what}")

    def at(self, member: str) -> Notes:
        """Notes for an object below the present one, gathered in the same list."""
        return Notes(f"{self.where}.{member}" if self.where else member, self.lines)


def scalar_text(value: object) -> str:
    """A JSON scalar as the text it has in JSON: `True` is "true", 3 is "3". Raises ValueError for anything else."""
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float() if math.isfinite(value):
            return repr(value)
    raise ValueError(f"{kind_of(value)} where a text is expected")


def kind_of(value: object) -> str:
    """What JSON calls a value, for a note."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _count(value: object) -> int:
    """A whole number >= 0; 1.5 cores are 2. Refuses booleans, negative and infinite numbers."""
    number = float("nan") if isinstance(value, bool) else value
    if isinstance(number, str):
        number = int(number) if number.strip().isdecimal() else float(number)
    if not isinstance(number, int | float) or not 0 <= number < math.inf:
        raise ValueError(f"{kind_of(value)} that is no count")
    return math.ceil(number)


def _seconds(value: object) -> float | None:
    return None if value is None or value == "" else units.parse_duration(value)


def _instant(value: object) -> float:
    """Unix seconds."""
    number = (
        float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    )
    if not math.isfinite(number):
        raise ValueError(f"{kind_of(value)} that is no time in unix seconds")
    return number


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{kind_of(value)} where an object is expected")  # noqa: TRY004 - validators raise ValueError
    return value


def _lenient(value: object, handler: Handler, info: ValidationInfo) -> Any:
    """None for what cannot be read, and a note; the texts of our own ValueErrors name the value and hold no secrets."""
    if value is None:
        return None
    try:
        return handler(value)
    except (ValueError, OverflowError) as unreadable:  # pydantic's ValidationError is a ValueError
        cause = unreadable.errors()[0] if hasattr(unreadable, "errors") else {}
        error = cause.get("ctx", {}).get("error") if cause.get("type") == "value_error" else None
        _note(info, f"is ignored: {error or kind_of(value) + ' that cannot be used'}")
        return None


def _note(info: ValidationInfo[Any], what: str) -> None:
    assert isinstance(info.context, Notes)
    info.context.add(str(info.field_name), what)


def _text_list(value: object, info: ValidationInfo) -> tuple[str, ...]:
    """A list of texts; scalars among them become texts, a single one is a list of one, nulls are dropped."""
    kept = []
    for element in value if isinstance(value, list) else [value]:
        try:
            kept.append(scalar_text(element))
        except ValueError:
            if element is not None:
                _note(info, f"holds {kind_of(element)}, which is dropped")
    return tuple(kept)


_LENIENT = WrapValidator(_lenient)
Text = Annotated[str | None, BeforeValidator(scalar_text), _LENIENT]
Texts = Annotated[tuple[str, ...] | None, BeforeValidator(_text_list), _LENIENT]
Flag = Annotated[bool | None, _LENIENT]
Count = Annotated[int | None, BeforeValidator(_count), _LENIENT]
Size = Annotated[int | None, BeforeValidator(units.parse_bytes), _LENIENT]
Secs = Annotated[float | None, BeforeValidator(_seconds), _LENIENT]
Instant = Annotated[float | None, BeforeValidator(_instant), _LENIENT]
Object = Annotated[dict[str, Any] | None, BeforeValidator(_object), _LENIENT]


class Wire(BaseModel):
    """The common ground: unknown members are ignored, names match in any case."""

    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    @classmethod
    def read(cls, value: object, notes: Notes) -> Self:
        """From a JSON value; one that is no object reads as an empty one. Never fails."""
        if not isinstance(value, dict):
            if value is not None:
                notes.lines.append(f"{notes.where} is ignored: {kind_of(value)} where an object is expected")
            value = {}
        return cls.model_validate(_exact_names(value, _names_of(cls)), context=notes)


@functools.cache
def _names_of(cls: type[Wire]) -> dict[str, str]:
    """Lower case -> the name as it should be."""
    names = [field.alias or name for name, field in cls.model_fields.items()]
    return {name.lower(): name for name in names}


def _exact_names(value: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The known members under their right names; where both spellings are there, the exact one wins."""
    known = {}
    for name, member in value.items():
        right = names.get(name.lower())
        if right == name or (right is not None and right not in value):
            known[right] = member
    return known


class Message(Wire):
    """The two members at the top."""

    experiment: Any = None
    config: Any = None
    message: Any = None  #: an envelope (INTEROP.md 6.1)


class Experiment(Wire):
    """`experiment` (INTEROP.md 1.2)."""

    key: Text = None
    project: Text = None
    filename: Text = None
    args: Texts = None
    pythonver: Any = None
    pythonenv: Texts = None
    resources_needed: Any = None
    artifacts: Any = None
    time_added: Instant = None
    time_last_checkpoint: Instant = None
    max_duration: Secs = None


class Config(Wire):
    """`config` (INTEROP.md 1.5): what a runner needs of it."""

    database: Any = None
    storage: Any = None
    saveWorkspaceFrequency: Secs = None
    experimentLifetime: Secs = None
    env: Object = None
    pip: Texts = None
    container: Any = None
    resources_needed: Any = None


class Container(Wire):
    """`config.container`."""

    image: Text = None


class Resources(Wire):
    """`resources_needed` (INTEROP.md 1.3)."""

    cpus: Count = None
    gpus: Count = None
    ram: Size = None
    hdd: Size = None
    gpuMem: Size = None
    gpuCount: Count = None


class Artifact(Wire):
    """`experiment.artifacts.<tag>` (INTEROP.md 1.4)."""

    key: Text = None
    qualified: Text = None
    url: Text = None
    bucket: Text = None
    mutable: Flag = None
    unpack: Flag = None
    credentials: Any = None
    region: Text = None
    saveFrequency: Secs = None


class Endpoint(Wire):
    """`config.storage`, `config.database`."""

    type: Text = None
    endpoint: Text = None
    bucket: Text = None
    region: Text = None
    credentials: Any = None
    aws_access_key: Text = None  #: the old style, beside the rest
    aws_secret_key: Text = None


class Credentials(Wire):
    """An AWS key pair in every spelling (INTEROP.md 1.6)."""

    access_key: Text = None
    access_key_id: Text = None
    aws_access_key: Text = None
    aws_access_key_id: Text = None
    secret_access_key: Text = None
    secret_key: Text = None
    aws_secret_key: Text = None
    aws_secret_access_key: Text = None
    session_token: Text = None
    aws_session_token: Text = None
    region: Text = None
    region_name: Text = None
