"""The store loses nothing, trusts nothing that it reads, and never stops a program."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from jevt_kernels.spec import Config
from jevt_kernels.tuning import Calibration, Identity, Record, Snapshot, Store, StoreWarning
from jevt_kernels.tuning import record as records
from jevt_kernels.tuning.store import default_folder

DEVICE = Identity("NVIDIA H100 80GB HBM3", 90, (("driver", "580.1"), ("jaxlib", "0.11.2")))
CONFIG = Config((("m", 128), ("n", 256), ("k", 64)), 8, 4, 132, 8, 1, 2, True)
RECORD = Record(CONFIG, 81.25, 101.5, "", "gemm 16x16x16", "2026-11-26T06:00:00+00:00")
WRONG = Record(None, None, 10.0, "wrong: output 0 differs", "", "")
CALIBRATION = Calibration(2.9e6, 6.1e8, 2.1, 3.2, "2026-11-26T06:00:00+00:00")


def test_what_is_stored_is_read_again(tmp_path):
    store = Store(tmp_path, DEVICE)
    assert store.load() == Snapshot()
    stored = store.add({"a": RECORD, "b": WRONG}, CALIBRATION)
    again = Store(tmp_path, DEVICE).load()
    assert again == stored == store.load()
    assert again.kernels == {"a": RECORD, "b": WRONG}
    assert again.calibration == CALIBRATION
    assert hash(again) == hash(stored) != hash(Snapshot())


def test_records_join_and_newer_ones_replace(tmp_path):
    one, two = Store(tmp_path, DEVICE), Store(tmp_path, DEVICE)
    one.add({"a": RECORD}, CALIBRATION)
    two.add({"b": RECORD})
    slower = dataclasses.replace(RECORD, kernel_us=99.0)
    one.add({"a": slower})
    assert two.load().kernels == {"a": slower, "b": RECORD}
    assert two.load().calibration == CALIBRATION


def test_snapshots_are_equal_by_content():
    one = Snapshot.of({"a": RECORD, "b": WRONG}, None)
    assert one == Snapshot.of({"b": WRONG, "a": RECORD}, None)
    assert one != Snapshot.of({"a": RECORD}, None)
    assert one != Snapshot.of({"a": RECORD, "b": WRONG}, CALIBRATION)
    assert Snapshot.of({}, None) == Snapshot()


def test_plain_json_that_names_device_and_versions(tmp_path):
    store = Store(tmp_path, DEVICE)
    store.add({"a": RECORD})
    data = json.loads(store.path.read_text())
    assert data["device"] == DEVICE.device
    assert data["versions"] == dict(DEVICE.versions)
    assert data["kernels"]["a"]["config"]["blocks"] == {"m": 128, "n": 256, "k": 64}
    assert store.path.name.startswith("nvidia-h100-80gb-hbm3-sm90-")
    assert sorted(p.suffix for p in store.path.parent.iterdir()) == [".json", ".lock"]


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(DEVICE, versions=(("driver", "580.1"), ("jaxlib", "0.12.0"))),
        dataclasses.replace(DEVICE, device="NVIDIA H200"),
        dataclasses.replace(DEVICE, capability=80),
    ],
)
def test_other_devices_and_versions_have_their_own_file(tmp_path, other):
    Store(tmp_path, DEVICE).add({"a": RECORD})
    assert Store(tmp_path, other).load() == Snapshot()


def _set(*path, value):
    def change(data):
        *parents, last = path
        for name in parents:
            data = data[name]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("schema", value=2), "expected 1 for schema"),
        (_set("device", value="NVIDIA L4"), "for device"),
        (_set("versions", "jaxlib", value="0.1"), "for versions"),
        (_set("kernels", value=[]), "an object of kernels"),
        (_set("kernels", "a", value={}), "expected the fields"),
        (_set("kernels", "a", "kernel_us", value="81"), "a number for kernel_us"),
        (_set("kernels", "a", "kernel_us", value=True), "a number for kernel_us"),
        (_set("kernels", "a", "kernel_us", value=float("nan")), "positive finite"),
        (_set("kernels", "a", "xla_us", value=-1), "positive finite"),
        (_set("kernels", "a", "kernel_us", value=None), "config with its kernel_us"),
        (_set("kernels", "a", "when", value=3), "text of at most"),
        (_set("kernels", "a", "config", "blocks", value={"m": 100}), "power of two"),
        (_set("kernels", "a", "config", "blocks", value={"m": 1 << 40}), "whole number"),
        (_set("kernels", "a", "config", "num_warps", value=-1), "num_warps"),
        (_set("kernels", "a", "config", "descriptors", value=1), "true or false"),
        (_set("calibration", "bytes_per_us", value=0), "positive finite"),
        (_set("calibration", "xla_launch_us", value=None), "xla_launch_us, got null"),
    ],
)
def test_files_that_are_not_as_expected_are_set_aside(tmp_path, change, message):
    store = Store(tmp_path, DEVICE)
    store.add({"a": RECORD}, CALIBRATION)
    data = json.loads(store.path.read_text())
    change(data)
    store.path.write_text(json.dumps(data))
    with pytest.warns(StoreWarning, match=f"could not be read: .*{message}.*now .*aside"):
        assert Store(tmp_path, DEVICE).load() == Snapshot()
    assert not store.path.exists()
    assert len(list(store.path.parent.glob("*.aside-*"))) == 1
    Store(tmp_path, DEVICE).add({"b": RECORD})
    assert Store(tmp_path, DEVICE).load().kernels == {"b": RECORD}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b"import os", b"[" * 100_000, b'\x80\x04\x95pickle"'],
)
def test_no_json_at_all(tmp_path, content):
    store = Store(tmp_path, DEVICE)
    store.path.parent.mkdir(parents=True)
    store.path.write_bytes(content)
    with pytest.warns(StoreWarning, match="could not be read"):
        assert store.load() == Snapshot()
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        assert store.load() == Snapshot()


def test_a_bad_file_is_set_aside_by_whoever_writes(tmp_path):
    store = Store(tmp_path, DEVICE)
    store.path.parent.mkdir(parents=True)
    store.path.write_text("{")
    with pytest.warns(StoreWarning, match="aside"):
        store.add({"a": RECORD})
    assert Store(tmp_path, DEVICE).load().kernels == {"a": RECORD}


def unwritable(folder: Path) -> Path:
    """A folder in which nothing can be made, for root either: it is a file."""
    (folder / "file").write_text("")
    return folder / "file"


@pytest.mark.parametrize("no_home", [True, False])
def test_without_a_folder_it_serves_the_process_and_warns_once(tmp_path, no_home):
    store = Store(None if no_home else unwritable(tmp_path), DEVICE)
    assert store.load() == Snapshot()
    with pytest.warns(StoreWarning, match="cannot be stored .*JEVT_CACHE_DIR") as log:
        store.add({"a": RECORD})
    assert len(log) == 1
    store.add({"b": RECORD}, CALIBRATION)  # a second warning would be an error
    assert store.load().kernels == {"a": RECORD, "b": RECORD}
    assert store.load().calibration == CALIBRATION


def test_what_could_not_be_stored_is_stored_later(tmp_path):
    blocked = unwritable(tmp_path)
    store = Store(blocked, DEVICE)
    with pytest.warns(StoreWarning):
        store.add({"a": RECORD})
    blocked.unlink()
    store.add({"b": RECORD})
    assert Store(blocked, DEVICE).load().kernels == {"a": RECORD, "b": RECORD}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_only_be_read(tmp_path):
    store = Store(tmp_path, DEVICE)
    store.add({"a": RECORD})
    folder = store.path.parent
    store.path.with_suffix(".lock").chmod(0o400)
    folder.chmod(0o500)
    try:
        reader = Store(tmp_path, DEVICE)
        assert reader.load().kernels == {"a": RECORD}
        with pytest.warns(StoreWarning, match="cannot be stored"):
            assert reader.add({"b": RECORD}).kernels == {"a": RECORD, "b": RECORD}
    finally:
        folder.chmod(0o700)


WRITER = """
import sys
from pathlib import Path
from jevt_kernels.tuning import Identity, Record, Store
name, folder = sys.argv[1:]
for i in range(30):
    Store(Path(folder), Identity("d", 90)).add({f"{name}{i}": Record(None, None, 1.0, name)})
"""


def test_two_processes_lose_nothing(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, name, tmp_path], env=environment)
        for name in "ab"
    ]
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    found = Store(tmp_path, Identity("d", 90)).load().kernels
    assert set(found) == {f"{name}{i}" for name in "ab" for i in range(30)}


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    store = Store(tmp_path, DEVICE)
    store.add({"a": RECORD})

    def interrupted(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.add({"b": RECORD})
    assert Store(tmp_path, DEVICE).load().kernels == {"a": RECORD}
    assert not list(store.path.parent.glob(".*"))


def test_files_are_read_only_when_they_have_changed(tmp_path, monkeypatch):
    Store(tmp_path, DEVICE).add({"a": RECORD})
    reader, reads = Store(tmp_path, DEVICE), []
    parse = Store._parse
    monkeypatch.setattr(Store, "_parse", lambda s, p: (reads.append(p), parse(s, p))[1])
    assert reader.load() == reader.load()
    assert len(reads) == 1
    Store(tmp_path, DEVICE).add({"b": RECORD})
    reads.clear()
    assert set(reader.load().kernels) == {"a", "b"}
    assert len(reads) == 1


def test_default_folder(tmp_path, monkeypatch):
    assert default_folder({"JEVT_CACHE_DIR": "/x", "XDG_CACHE_HOME": "/y"}) == Path("/x")
    assert default_folder({"XDG_CACHE_HOME": "/y"}) == Path("/y/jevt")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert default_folder({"XDG_CACHE_HOME": "relative"}) == tmp_path / ".cache" / "jevt"

    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert default_folder({}) is None


@pytest.mark.parametrize("value", [RECORD, WRONG])
def test_records_survive_json(value):
    assert records.record(json.loads(json.dumps(records.to_json(value)))) == value
