"""Options of the backend, each with an environment variable.

``torch.compile(model, backend="fusedhead", options={"fusedhead.debug": True})`` or ``FUSEDHEAD_DEBUG=1``. Options
given with a compilation win over those given to ``fusedhead.enable``, and those over the environment. Everything
that does not start with ``fusedhead.`` is Inductor's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import Any, Literal, TypedDict

log = logging.getLogger("fusedhead")

PREFIX = "fusedhead."
ENVIRONMENT = "FUSEDHEAD_"
PLACES = ("FUSEDHEAD_TILES", "FUSEDHEAD_SELF_CHECK")  # variables that are no option: where files are kept


class OptionValues(TypedDict, total=False):
    """The options as `fusedhead.enable` takes them, for checkers of types."""

    debug: bool
    strict: bool
    memory: Literal["auto", "min"] | int
    logits: Literal["deferred", "eager"]
    min_logits: Literal["auto"] | int
    shards: bool
    gradients: Literal["exact", "float8"]


@dataclass(frozen=True)
class Options:
    """The backend's settings.

    debug: print the report and the rewritten graph of every compiled graph.
    strict: an unfused head, or any error inside the pass, raises.
    memory: workspace of a head: "auto", "min", or a number of MiB.
    logits: what the caller gets where logits leave the graph: "deferred" or "eager".
    min_logits: a head of fewer logits, tokens times vocabulary, is left to Inductor: "auto" or a number.
    shards: heads whose weight is a DTensor in shards of the vocabulary are fused.
    gradients: "exact", or "float8": products of a head's gradients on GPUs that have it, large entries exact.
    """

    debug: bool = False
    strict: bool = False
    memory: str | int = "auto"
    logits: str = "deferred"
    min_logits: str | int = "auto"
    shards: bool = True
    gradients: str = "exact"

    @property
    def budget(self) -> int:
        """``read_memory`` as the ops take it: 0 automatic, -1 least, else MiB."""
        names: dict[str | int, int] = {"auto": 0, "min": -1}
        return names[self.memory] if self.memory in names else int(self.memory)


def boolean(value: Any) -> bool:
    words = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
    }
    if isinstance(value, bool):
        return value
    if str(value).lower() in words:
        return words[str(value).lower()]
    raise ValueError("expected True or False")


def read_memory(value: Any) -> str | int:
    if value in ("auto", "min"):
        return value
    if not isinstance(value, bool) and str(value).isdigit() and int(value) > 0:
        return int(value)
    raise ValueError('expected "auto", "min" or a positive number of MiB')


def min_logits(value: Any) -> str | int:
    if value == "auto":
        return "auto"
    if not isinstance(value, bool) and str(value).isdigit():
        return int(value)
    raise ValueError('expected "auto" or a number of logits, 0 for every head')


def one_of(*allowed: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value in allowed:
            return value
        raise ValueError(f"expected one of {', '.join(map(repr, allowed))}")

    return check


READERS: dict[str, Callable[[Any], Any]] = {
    "debug": boolean,
    "strict": boolean,
    "memory": read_memory,
    "logits": one_of("deferred", "eager"),
    "min_logits": min_logits,
    "shards": boolean,
    "gradients": one_of("exact", "float8"),
}
assert set(READERS) == {field.name for field in fields(Options)} == set(OptionValues.__annotations__)


def read_option(name: str, value: Any, given_as: str) -> Any:
    try:
        return READERS[name](value)
    except ValueError as error:
        raise ValueError(f"fusedhead: {given_as}={value!r} is not valid: {error}") from None


process_wide: Mapping[str, Any] = {}  # what `enable` was given, checked; replaced as a whole, never changed


def set_process_wide(options: Mapping[str, Any]) -> None:
    """Make ``options`` (names without the prefix) every compilation's defaults.

    Raises ValueError as `split_options` does.
    """
    global process_wide
    unknown = [name for name in options if name not in READERS]
    if unknown:
        raise ValueError(f"fusedhead: unknown option {unknown[0]!r}{nearest(unknown[0], READERS)}")
    process_wide = {name: read_option(name, value, name) for name, value in options.items()}


def nearest(name: str, valid: Iterable[str]) -> str:
    """The hint after an unknown name: the nearest valid one, and all of them."""
    close = get_close_matches(name, valid, n=1)
    listed = f"the valid ones are {', '.join(valid)}"
    return f", did you mean {close[0]!r}? T{listed[1:]}" if close else f"; {listed}"


def inductors(name: str) -> bool:
    """Whether Inductor has a setting of this name."""
    try:
        return hasattr(import_module("torch._inductor.config"), name)
    except ImportError:
        return False


@cache
def check_environment() -> tuple[str, ...]:
    """The variables ``FUSEDHEAD_*`` that nothing reads, each with a warning; looked for once a process."""
    readable = [*(ENVIRONMENT + name.upper() for name in READERS), *PLACES]
    unknown = tuple(sorted(name for name in os.environ if name.startswith(ENVIRONMENT) and name not in readable))
    for name in unknown:
        log.warning("fusedhead: nothing reads the variable %s%s", name, nearest(name, readable))
    return unknown


def split_options(options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """The backend's own options (with the environment's as defaults), and the rest for Inductor.

    Raises ValueError for an unknown ``fusedhead.*`` name, listing the valid ones, or for a bad value.
    """
    check_environment()
    values: dict[str, Any] = {}
    for name in READERS:
        variable = ENVIRONMENT + name.upper()
        if os.environ.get(variable):
            values[name] = read_option(name, os.environ[variable], variable)
    values.update(process_wide)
    rest: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if not key.startswith(PREFIX):
            if key in READERS and not inductors(key):
                raise ValueError(f"fusedhead: unknown option {key!r}, did you mean {PREFIX + key!r}?")
            rest[key] = value
            continue
        name = key.removeprefix(PREFIX)
        if name not in READERS:
            raise ValueError(f"fusedhead: unknown option {key!r}{nearest(key, [PREFIX + name for name in READERS])}")
        values[name] = read_option(name, value, key)
    return Options(**values), rest
