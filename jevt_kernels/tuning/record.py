"""What a measurement leaves behind, and its form as plain JSON.

Whatever is read is checked field by field before it is used: :func:`record` and
:func:`calibration` raise ``ValueError`` that names the first field that is not as expected.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from collections.abc import Mapping
from typing import Any

from jevt_kernels.spec import Config

#: Longest text of an error or a description that is kept.
_TEXT = 200

#: Largest size of a block, and largest value of the other numbers of a configuration.
_LARGEST = 1 << 20


@dataclasses.dataclass(frozen=True)
class Record:
    """What was measured of one kernel on one device.

    Attributes:
      config: the fastest configuration whose results were right; None if there was none.
      kernel_us: microseconds of a call with it, launch included; None without a configuration.
      xla_us: microseconds of the same equations as XLA runs them; None if they could not be timed.
      error: why there is no configuration, "" if there is one.
      about: mainloop and sizes, for whoever reads the file.
      when: date and time of the measurement, ISO 8601, UTC.
    """

    config: Config | None
    kernel_us: float | None
    xla_us: float | None
    error: str = ""
    about: str = ""
    when: str = ""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a device sustains, as the cost model counts it.

    Attributes:
      bytes_per_us: copy bandwidth, bytes read plus bytes written per microsecond.
      cublas_flops_per_us: bfloat16 rate of XLA's matrix product of a training step's shape.
      xla_launch_us: cost of one small XLA fusion inside a program.
      triton_launch_us: cost of one small Triton call inside a program.
      when: date and time of the measurement, ISO 8601, UTC.
    """

    bytes_per_us: float
    cublas_flops_per_us: float
    xla_launch_us: float
    triton_launch_us: float
    when: str = ""


def now() -> str:
    """The time as records hold it."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def to_json(value: Record | Calibration) -> dict[str, Any]:
    """As ``json.dump`` takes it."""
    data = dataclasses.asdict(value)
    if isinstance(value, Record) and value.config is not None:
        data["config"] = config_to_json(value.config)
    return data


def config_to_json(config: Config) -> dict[str, Any]:
    """As ``json.dump`` takes it."""
    return {**dataclasses.asdict(config), "blocks": dict(config.blocks)}


def record(data: object) -> Record:
    """The record that :func:`to_json` wrote.

    Raises:
      ValueError: it is none.
    """
    fields = _fields(data, Record)
    found = config(fields["config"]) if fields["config"] is not None else None
    kernel_us = _time("kernel_us", fields["kernel_us"])
    if (found is None) != (kernel_us is None):
        raise ValueError("expected a config with its kernel_us, or neither")
    return Record(
        found,
        kernel_us,
        _time("xla_us", fields["xla_us"]),
        *(_text(name, fields[name]) for name in ("error", "about", "when")),
    )


def calibration(data: object) -> Calibration:
    """The calibration that :func:`to_json` wrote.

    Raises:
      ValueError: it is none.
    """
    fields = _fields(data, Calibration)
    when = _text("when", fields.pop("when"))
    rates = {name: _time(name, value) for name, value in fields.items()}
    missing = [name for name, rate in rates.items() if rate is None]
    if missing:
        raise ValueError(f"expected a number for {missing[0]}, got null")
    return Calibration(**{n: r for n, r in rates.items() if r is not None}, when=when)


def config(data: object) -> Config:
    """The configuration that :func:`config_to_json` wrote.

    Raises:
      ValueError: it is none.
    """
    fields = _fields(data, Config)
    blocks = fields.pop("blocks")
    if not isinstance(blocks, dict) or not blocks:
        raise ValueError(f"expected blocks by tile axis, got {blocks!r}")
    for name, size in blocks.items():
        if _whole(f"block {name}", size, 1) & (size - 1):
            raise ValueError(f"expected a power of two for block {name}, got {size}")
    ahead, descriptors = (_flag(name, fields.pop(name)) for name in ("ahead", "descriptors"))
    specialized = _text("specialized", fields.pop("specialized"))
    numbers = {name: _whole(name, value, 0) for name, value in fields.items()}
    return Config(
        tuple(blocks.items()),
        ahead=ahead,
        descriptors=descriptors,
        specialized=specialized,
        **numbers,
    )


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false for {name}, got {value!r}")
    return value


def _fields(data: object, kind: type) -> dict[str, Any]:
    """The members of an object that has exactly the fields of a dataclass."""
    expected = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(data, Mapping) or set(data) != expected:
        got = sorted(map(str, data)) if isinstance(data, Mapping) else data
        raise ValueError(f"expected the fields {sorted(expected)}, got {str(got)[:_TEXT]}")
    return dict(data)


def _time(name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number for {name}, got {str(value)[:_TEXT]!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"expected a positive finite number for {name}, got {value}")
    return float(value)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or len(value) > _TEXT:
        raise ValueError(f"expected a text of at most {_TEXT} characters for {name}")
    return value


def _whole(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST:
        raise ValueError(f"expected a whole number of {least} to {_LARGEST} for {name}")
    return value
