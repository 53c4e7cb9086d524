"""The store of measured times: one file of plain JSON for each device and set of versions.

A file is written to a temporary name and renamed, so that it is always whole; writers hold a lock
while they merge, so that of two processes none loses anything. What is read is checked, and a file
that is not as expected is set aside with a warning; nothing of it is executed. Where the folder
cannot be written, a store serves its process and says so once.

    {"schema": 1, "device": "NVIDIA H100 80GB HBM3", "capability": 90, "versions": {"jaxlib": …},
     "calibration": null,
     "kernels": {"<digest>": {"config": {"blocks": {"m": 128, …}, "num_warps": 8, …},
                              "kernel_us": 81.2, "xla_us": 101.0, …}}}
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jevt_kernels.tuning import record as records
from jevt_kernels.tuning.identity import Identity
from jevt_kernels.tuning.record import Calibration, Record

try:
    import fcntl
except ImportError:  # Windows, for which there is no Triton, and so nothing to store
    fcntl = None  # type: ignore[assignment]

#: Version of the file's form.
SCHEMA = 1

#: No store is larger; a file that is, is not read.
_MOST_BYTES = 64 << 20


class StoreWarning(UserWarning):
    """The store of measured times is not as it should be; programs run all the same."""


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """What a store held at one moment; equal to another one of the same content, and hashable.

    Attributes:
      kernels: records by key.
      calibration: of the device, None before it was measured.
      digest: of the content; "" for a store that holds nothing.
    """

    kernels: Mapping[str, Record] = MappingProxyType({})
    calibration: Calibration | None = None
    digest: str = ""

    @classmethod
    def of(cls, kernels: Mapping[str, Record], calibration: Calibration | None) -> Snapshot:
        """A snapshot of these records."""
        if not kernels and calibration is None:
            return cls()
        items = (sorted((k, repr(r)) for k, r in kernels.items()), repr(calibration))
        digest = hashlib.sha256(repr(items).encode()).hexdigest()
        return cls(MappingProxyType(dict(kernels)), calibration, digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Snapshot({len(self.kernels)} kernels, {self.digest[:8] or 'empty'})"


#: What is known where nothing is.
NOTHING = Snapshot()


def default_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """``JEVT_CACHE_DIR``, else ``jevt`` in the user's cache folder; None if there is no home."""
    if chosen := environ.get("JEVT_CACHE_DIR", "").strip():
        return Path(chosen)
    cache = environ.get("XDG_CACHE_HOME", "")
    if cache and Path(cache).is_absolute():  # the standard ignores relative ones
        return Path(cache) / "jevt"
    try:
        return Path.home() / ".cache" / "jevt"
    except RuntimeError:
        return None


class Store:
    """The records of one device.

    Args:
      folder: of the file; made when something is stored. None for a store in memory.
      identity: whose records they are.
    """

    def __init__(self, folder: Path | None, identity: Identity) -> None:
        self.identity = identity
        self.path = None if folder is None else folder / "tuning" / f"{identity.slug}.json"
        self._lock = threading.Lock()
        self._unsaved = Snapshot()
        self._seen: tuple[Any, Snapshot] = (None, Snapshot())
        self._warned = False

    def load(self) -> Snapshot:
        """What is known now; the file is read when it has changed."""
        with self._lock:
            state = self._state()
            if state != self._seen[0]:
                self._seen = state, self._read_or_set_aside()
            return _merged(self._seen[1], self._unsaved)

    def add(
        self, kernels: Mapping[str, Record], calibration: Calibration | None = None
    ) -> Snapshot:
        """Adds records to the file, beside what others have put there meanwhile.

        Returns:
          All that is known now.
        """
        with self._lock:
            self._unsaved = _merged(self._unsaved, Snapshot.of(kernels, calibration))
            try:
                with self._locked() as path:
                    content = _merged(self._read(path), self._unsaved)
                    _write(path, self._text(content))
            except OSError as error:
                self._warn(error)
                return _merged(self._seen[1], self._unsaved)
            self._unsaved = Snapshot()
            self._seen = self._state(), content
            return content

    def _state(self) -> Any:
        """Changes when the file is replaced."""
        try:
            stat = self.path.stat() if self.path else None
        except OSError:
            return None
        return stat and (stat.st_ino, stat.st_mtime_ns, stat.st_size)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Path]:
        """The path, while no other process writes to it."""
        if self.path is None:
            raise FileNotFoundError("there is no home folder; set JEVT_CACHE_DIR")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("a") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
            yield self.path

    def _read_or_set_aside(self) -> Snapshot:
        """The file's content, without the right to write to its folder."""
        assert self.path is not None, "a store in memory has no file that could change"
        try:
            return self._parse(self.path)
        except FileNotFoundError:
            return Snapshot()
        except (OSError, ValueError, RecursionError) as error:
            try:
                with self._locked() as path:
                    return self._read(path)
            except OSError:
                self._ignored(error, "It is ignored")
                return Snapshot()

    def _read(self, path: Path) -> Snapshot:
        """The file's content; called under the lock, so that none but a bad file is set aside."""
        try:
            return self._parse(path)
        except FileNotFoundError:
            return Snapshot()
        except (ValueError, RecursionError) as error:
            aside = path.with_suffix(f".aside-{records.now().replace(':', '')}")
            path.replace(aside)
            self._ignored(error, f"It is now {aside.name}")
            return Snapshot()

    def _ignored(self, error: Exception, what: str) -> None:
        warnings.warn(
            f"jevt: the measured times in {self.path} could not be read: {error}. {what}, and"
            " predicted times are used; jevt.jit(tune='on') measures again.",
            StoreWarning,
            stacklevel=4,
        )

    def _parse(self, path: Path) -> Snapshot:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise ValueError(f"expected at most {_MOST_BYTES} characters")
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"expected an object, got {type(data).__name__}")
        for name, value in self._header().items():
            if data.get(name) != value:
                raise ValueError(f"expected {value!r} for {name}, got {str(data.get(name))[:80]!r}")
        kernels = data.get("kernels")
        if not isinstance(kernels, dict):
            raise ValueError("expected an object of kernels")
        calibration = data.get("calibration")
        return Snapshot.of(
            {key: records.record(value) for key, value in kernels.items()},
            None if calibration is None else records.calibration(calibration),
        )

    def _header(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "device": self.identity.device,
            "capability": self.identity.capability,
            "versions": dict(self.identity.versions),
        }

    def _text(self, content: Snapshot) -> str:
        calibration = content.calibration
        data = self._header() | {
            "calibration": None if calibration is None else records.to_json(calibration),
            "kernels": {k: records.to_json(r) for k, r in sorted(content.kernels.items())},
        }
        return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"jevt: measured times cannot be stored in {self.path or 'a file'}: {error}. They"
                " serve this process only; set JEVT_CACHE_DIR to a folder that can be written.",
                StoreWarning,
                stacklevel=4,
            )


def _merged(older: Snapshot, newer: Snapshot) -> Snapshot:
    if not newer.digest:
        return older
    if not older.digest:
        return newer
    kernels = {**older.kernels, **newer.kernels}
    return Snapshot.of(kernels, newer.calibration or older.calibration)


def _write(path: Path, text: str) -> None:
    """Replaces the file in one step."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@functools.cache
def opened(folder: Path | None, identity: Identity) -> Store:
    """The store of this process, which reads its file again only when it has changed."""
    return Store(folder, identity)
