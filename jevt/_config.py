"""Options of ``jevt.jit`` and environment variables, validated once.

| variable        | values             | effect                                                    |
|-----------------|--------------------|-----------------------------------------------------------|
| `JEVT_DEBUG`    | 0, 1, 2, 3         | print a line a compilation; the plan; every stage         |
| `JEVT_DUMP_DIR` | a directory        | write stages, plan and sources, one folder a compilation  |
| `JEVT_FUEL`     | a number of groups | lower only so many to Triton, to bisect a miscompile      |
| `JEVT_CHECK`    | 0, 1               | check every stage's types; run groups beside their own    |
|                 |                    | equations                                                 |
| `JEVT_TUNE`     | off, on            | the default of ``jevt.jit(tune=…)``                       |
| `JEVT_CACHE_DIR`| a directory        | where measured times are kept; ``jevt`` in the user's     |
|                 |                    | cache folder by default                                   |
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import pathlib
import typing
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from jevt._context import Backend

type Tune = Literal["off", "on"]

BACKENDS: tuple[str, ...] = typing.get_args(Backend.__value__)
TUNES: tuple[str, ...] = typing.get_args(Tune.__value__)
VARIABLES = (
    *("JEVT_DEBUG", "JEVT_DUMP_DIR", "JEVT_FUEL", "JEVT_CHECK"),
    *("JEVT_TUNE", "JEVT_CACHE_DIR"),
)


class ConfigError(ValueError):
    """An option or an environment variable has a value that jevt does not know."""


@dataclasses.dataclass(frozen=True)
class Environment:
    """What the environment variables say, see the table above.

    Attributes:
      debug: how much to print, 0 to 3.
      dump_dir: where to write stages, None for nowhere.
      fuel: number of groups that may be lowered to Triton, None for all.
      check: whether to check stages and groups.
      tune: whether to measure kernels, where ``jevt.jit`` does not say.
      cache_dir: where measured times are kept, None for the user's cache folder.
    """

    debug: int = 0
    dump_dir: pathlib.Path | None = None
    fuel: int | None = None
    check: bool = False
    tune: Tune = "off"
    cache_dir: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """Validated options of one ``jevt.jit``."""

    backend: Backend = "auto"
    strict: bool = False
    environment: Environment = Environment()
    tune: Tune = "off"


def make_options(backend: object, strict: object, tune: object = None) -> Options:
    """Checks the options that are jevt's own.

    Raises:
      ConfigError: a value is not legal; the message lists those that are.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        note = ""
        if backend in ("cpu", "gpu", "cuda", "tpu", "rocm"):
            note = (
                " It chooses how fused groups run, not on which device: jax.jit's deprecated option"
                " of the same name is replaced by jax.device_put or jax.default_device."
            )
        elif isinstance(backend, str):
            note = did_you_mean(backend, BACKENDS)
        raise ConfigError(f"jevt.jit: backend must be {_one_of(BACKENDS)}, got {backend!r}.{note}")
    if not isinstance(strict, bool):
        raise ConfigError(f"jevt.jit: strict must be True or False, got {strict!r}.")
    if tune is not None and (not isinstance(tune, str) or tune not in TUNES):
        note = did_you_mean(tune, TUNES) if isinstance(tune, str) else ""
        if isinstance(tune, bool):
            note = f" Did you mean {'on' if tune else 'off'!r}?"
        raise ConfigError(
            f"jevt.jit: tune must be {_one_of(TUNES)}, or None for what JEVT_TUNE says, got"
            f" {tune!r}.{note}"
        )
    if backend == "interpret" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "jevt.jit: backend='interpret' runs kernels in Triton's interpreter, which Triton"
            " chooses when it is imported. Set TRITON_INTERPRET=1 in the environment before Python"
            " starts, or os.environ['TRITON_INTERPRET'] = '1' before triton, jax_triton or jevt is"
            " imported."
        )
    environment = read_environment()
    chosen = environment.tune if tune is None else typing.cast(Tune, tune)
    return Options(typing.cast(Backend, backend), strict, environment, chosen)


def read_environment(environ: Mapping[str, str] | None = None) -> Environment:
    """Parses the ``JEVT_*`` variables.

    Raises:
      ConfigError: a variable's value is not legal; the message lists those that are.
    """
    environ = os.environ if environ is None else environ
    for name in environ:
        is_unknown = name.startswith("JEVT_") and name not in VARIABLES
        # Only a likely typing error is worth a warning: other parts may have their own variables.
        if is_unknown and (hint := did_you_mean(name, VARIABLES)):
            warnings.warn(f"Environment variable {name} is unknown to jevt.{hint}", stacklevel=3)
    tune = environ.get("JEVT_TUNE", "").strip() or "off"
    if tune not in TUNES:
        raise ConfigError(f"JEVT_TUNE must be {_one_of(TUNES)} (or unset), got {tune!r}.")
    return Environment(
        debug=_integer(environ, "JEVT_DEBUG", 3) or 0,
        dump_dir=_directory(environ, "JEVT_DUMP_DIR"),
        fuel=_integer(environ, "JEVT_FUEL", None),
        check=bool(_integer(environ, "JEVT_CHECK", 1)),
        tune=typing.cast(Tune, tune),
        cache_dir=_directory(environ, "JEVT_CACHE_DIR"),
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that names the closest known name, "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def reject_unknown(function: str, unknown: Iterable[str], known: Iterable[str]) -> None:
    """Raises ``TypeError`` that names unknown keyword arguments and the closest known ones."""
    known = list(known)
    for name in unknown:
        raise TypeError(
            f"{function} got an unexpected option {name!r}.{did_you_mean(name, known)}"
            f" Its options are {', '.join(known)}."
        )


def _directory(environ: Mapping[str, str], name: str) -> pathlib.Path | None:
    text = environ.get(name, "").strip()
    if text and pathlib.Path(text).exists() and not pathlib.Path(text).is_dir():
        raise ConfigError(f"{name} must be a directory or a new path, got the file {text!r}.")
    return pathlib.Path(text) if text else None


def _integer(environ: Mapping[str, str], name: str, highest: int | None) -> int | None:
    text = environ.get(name, "").strip()
    if not text:
        return None
    expected = "an integer ≥ 0" if highest is None else _one_of(range(highest + 1))
    if not text.isascii() or not text.isdigit() or (highest is not None and int(text) > highest):
        raise ConfigError(f"{name} must be {expected} (or unset), got {text!r}.")
    return int(text)


def _one_of(values: Iterable[Any]) -> str:
    *first, last = [repr(v) for v in values]
    return f"{', '.join(first)} or {last}"
