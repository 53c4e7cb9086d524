from __future__ import annotations

import pathlib

import pytest

import jevt
from jevt import _config


def test_defaults():
    assert _config.read_environment({}) == _config.Environment()
    assert _config.read_environment({"JEVT_DEBUG": "", "JEVT_FUEL": " "}) == _config.Environment()


def test_values(tmp_path):
    environment = _config.read_environment(
        {"JEVT_DEBUG": "3", "JEVT_DUMP_DIR": str(tmp_path), "JEVT_FUEL": "0", "JEVT_CHECK": "1"}
    )
    assert environment == _config.Environment(3, pathlib.Path(tmp_path), 0, True)
    environment = _config.read_environment({"JEVT_TUNE": "on", "JEVT_CACHE_DIR": "some/where"})
    assert environment.tune == "on"
    assert environment.cache_dir == pathlib.Path("some/where")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("JEVT_DEBUG", "4", "JEVT_DEBUG must be 0, 1, 2 or 3 .* got '4'"),
        ("JEVT_DEBUG", "yes", "0, 1, 2 or 3"),
        ("JEVT_CHECK", "2", "JEVT_CHECK must be 0 or 1"),
        ("JEVT_FUEL", "-1", "JEVT_FUEL must be an integer ≥ 0 .* got '-1'"),
        ("JEVT_FUEL", "1.5", "integer"),
        ("JEVT_FUEL", "²", "integer"),
        ("JEVT_DUMP_DIR", __file__, "must be a directory"),
        ("JEVT_TUNE", "yes", "JEVT_TUNE must be 'off' or 'on' .* got 'yes'"),
        ("JEVT_CACHE_DIR", __file__, "JEVT_CACHE_DIR must be a directory"),
    ],
)
def test_illegal_values(name, value, message):
    with pytest.raises(jevt.ConfigError, match=message):
        _config.read_environment({name: value})


def test_read_when_a_function_is_made(monkeypatch):
    monkeypatch.setenv("JEVT_DEBUG", "loud")
    with pytest.raises(jevt.ConfigError, match="JEVT_DEBUG"):
        jevt.jit(lambda x: x)


def test_misspelt_variable_warns():
    with pytest.warns(UserWarning, match="JEVT_DEBG is unknown.*Did you mean 'JEVT_DEBUG'"):
        _config.read_environment({"JEVT_DEBG": "1"})
    _config.read_environment({"JEVT_SOMETHING_ELSE_ENTIRELY": "1"})


@pytest.mark.parametrize("backend", [None, 1, "", "XLA", ["xla"]])
def test_backend_that_is_no_name(backend):
    with pytest.raises(jevt.ConfigError, match="backend must be"):
        _config.make_options(backend, False)


def test_tuning(monkeypatch):
    assert _config.make_options("auto", False).tune == "off"
    monkeypatch.setenv("JEVT_TUNE", "on")
    assert _config.make_options("auto", False).tune == "on"
    assert _config.make_options("auto", False, "off").tune == "off"


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        (True, "tune must be 'off' or 'on', or None .* got True. Did you mean 'on'"),
        ("of", "Did you mean 'off'"),
        (3, "got 3"),
    ],
)
def test_tuning_that_is_no_choice(tune, message):
    with pytest.raises(jevt.ConfigError, match=message):
        jevt.jit(lambda x: x, tune=tune)


def test_legal_backends(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for backend in _config.BACKENDS:
        assert _config.make_options(backend, True).backend == backend
