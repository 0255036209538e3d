"""Options: the base of everything that can be set, and how a mistake in them is reported."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator, model_validator

from bench.errors import did_you_mean
from bench.runtime.files import expanded


class Config(BaseModel):
    """Base of a plugin's options and of a run's settings: immutable, and an unknown key is an error, not ignored.

    EXECUTION: of a reward's options, those that say how its scores are computed and not which: how many at a time, how
    often a service is asked. They are no part of the hash that names a run, and a run may resume with others.
    """

    EXECUTION: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _complete_groups(cls, values: Any) -> Any:
        """Of a group of options, some of which are given, the others keep the values that this class has for them."""
        if not isinstance(values, dict):
            return values
        defaults = {name: info.default for name, info in cls.model_fields.items() if isinstance(info.default, Config)}
        partial = {name: group for name, group in defaults.items() if isinstance(values.get(name), dict)}
        return values | {name: group.model_dump() | values[name] for name, group in partial.items()}

    @field_validator("*")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        return expanded(value)


def execution_keys(options: Config, prefix: str) -> Iterator[str]:
    """Dotted keys of `EXECUTION`, of the options and of those within them."""
    yield from (prefix + name for name in options.EXECUTION)
    for name, value in options:
        if isinstance(value, Config):
            yield from execution_keys(value, f"{prefix}{name}.")


def _distinct(values: list[Any]) -> list[Any]:
    if twice := [value for place, value in enumerate(values) if value in values[:place]]:
        raise ValueError(f"{twice[0]!r} stands there twice")
    return values


Distinct = AfterValidator(_distinct)  # of a list's annotation: no value stands in it twice


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested settings; an empty mapping is a value."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def explain(mistake: Any, keys: list[str]) -> str:
    """One sentence for a mistake that pydantic found; keys: what may be set."""
    where, value = ".".join(map(str, mistake["loc"])), mistake["input"]
    if mistake["type"] == "extra_forbidden":
        while isinstance(value, dict) and len(value) == 1:  # the whole key that was given, not its first word
            ((key, value),) = value.items()
            where += f".{key}"
        section = where.rpartition(".")[0]
        siblings = [key for key in keys if key.startswith(section + ".")] or keys
        return f"unknown setting {where!r}{did_you_mean(where, siblings)}"
    if mistake["type"] == "value_error" and isinstance(value, dict | BaseModel):  # of a whole section
        return f"{where}{': ' * bool(where)}{mistake['ctx']['error']}."
    reason = mistake["msg"].removeprefix("Value error, ")
    return f"{where} = {value!r}: {reason[0].lower()}{reason[1:]}."


def paths(options: Config, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Dotted key and value of every option that is a file or folder."""
    for key, value in options:
        if isinstance(value, Config):
            yield from paths(value, f"{prefix}{key}.")
        elif isinstance(value, Path):
            yield prefix + key, value
