"""Set-up: versions, the choice of a Python, and the golden files' fixture."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from jevt_kernels import compat

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_python_too_old() -> None:
    program = "import sys; sys.version_info = (3, 11, 7, 'final', 0); import jevt_kernels"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "ImportError: jevt needs Python 3.12 or newer, got 3.11" in result.stderr


def test_an_old_python_gets_as_far_as_that_error() -> None:
    """Other modules do not parse on it, so the check has to be the first thing that runs."""
    kernels = ast.parse((ROOT / "jevt_kernels" / "__init__.py").read_text(), feature_version=(3, 8))
    assert ast.unparse(kernels.body[1]) == "import sys"
    assert isinstance(kernels.body[2], ast.If)
    jevt = ast.parse((ROOT / "jevt" / "__init__.py").read_text(), feature_version=(3, 8))
    assert ast.unparse(jevt.body[1]).startswith("import jevt_kernels")


def test_default_versions_are_supported_and_need_no_torch(project: dict) -> None:
    bounds = dict(d.split(">=") for d in project["dependencies"])
    assert compat.parse_version(bounds["triton"]) >= compat.MINIMUM_TRITON
    for dependencies in (project["dependencies"], *project["optional-dependencies"].values()):
        assert not [dependency for dependency in dependencies if "torch" in dependency]


def test_extras(project: dict) -> None:
    assert {"cuda12", "cuda13", "bench", "dev"} <= project["optional-dependencies"].keys()


def fake_python(path: Path, version: tuple[int, int], *, runs: bool = True) -> None:
    """A program that answers as Python ``version`` and records that it makes an environment."""
    old = int(version < (3, 12))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "#!/bin/bash\n"
        + ("" if runs else "exit 127\n")
        + f'if [ "$1" = -c ]; then exit {old}; fi\n'
        + f'echo "{path.parent.parent.name}/{path.name} $*"\n'
    )
    path.chmod(0o755)


def make_venv(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts" / "make-venv", "DIR"],
        env={
            "PATH": f"{tmp_path}/path/bin:/usr/bin:/bin",
            "PYENV_ROOT": str(tmp_path / "pyenv"),
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_shims_that_do_not_run_are_passed_over(tmp_path: Path) -> None:
    fake_python(tmp_path / "path/bin/python3.13", (3, 13), runs=False)
    fake_python(tmp_path / "path/bin/python3.12", (3, 12))
    assert make_venv(tmp_path).stdout == "path/python3.12 -m venv --clear DIR\n"


def test_newest_of_pyenv(tmp_path: Path) -> None:
    for name in ("python3.13", "python3.12", "python3"):
        fake_python(tmp_path / "path/bin" / name, (3, 11), runs=name == "python3")
    for version in ((3, 9), (3, 12), (3, 13)):
        fake_python(tmp_path / f"pyenv/versions/3.{version[1]}.1/bin/python", version)
    assert make_venv(tmp_path).stdout == "3.13.1/python -m venv --clear DIR\n"


def test_uv_when_there_is_no_python(tmp_path: Path) -> None:
    for name in ("python3.13", "python3.12", "python3"):
        fake_python(tmp_path / "path/bin" / name, (3, 11))
    fake_python(tmp_path / "path/bin/uv", (0, 0))
    assert make_venv(tmp_path).stdout.startswith("path/uv venv")


def test_no_python_at_all(tmp_path: Path) -> None:
    for name in ("python3.13", "python3.12", "python3"):
        fake_python(tmp_path / "path/bin" / name, (3, 11))
    result = make_venv(tmp_path)
    if "uv venv" in result.stdout or not result.returncode:
        pytest.skip("uv is installed")
    assert result.stderr.startswith("jevt needs Python 3.12 or newer")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("driver", "extra"), [("580.65.06", "cuda13"), ("535.1", "cuda12"), ("470.2", ""), (None, "")]
)
def test_extra_for_the_driver(driver: str | None, extra: str, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/bash\necho {driver}\n" if driver else "#!/bin/bash\nexit 9\n")
    program.chmod(0o755)
    result = subprocess.run(
        [ROOT / "scripts" / "cuda-extra"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == extra


def test_missing_golden_file(
    golden: Callable[[str, str], None], request: pytest.FixtureRequest
) -> None:
    if request.config.getoption("--update-golden"):
        pytest.skip("golden files are being written")
    with pytest.raises(pytest.fail.Exception, match="create it with pytest --update-golden"):
        golden("no_such_file.txt", "text")


def test_golden_file(tmp_path: Path) -> None:
    """Differences fail, and are accepted with ``--update-golden``."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "golden").mkdir()
    (tmp_path / "golden" / "a.txt").write_text("old\n")
    (tmp_path / "test_a.py").write_text("def test(golden): golden('a.txt', 'new')\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    codes = [
        subprocess.run(
            [*command, *options], env=environment, cwd=tmp_path, capture_output=True, check=False
        ).returncode
        for options in ([], ["--update-golden"], [])
    ]
    assert codes == [1, 0, 0]
    assert (tmp_path / "golden" / "a.txt").read_text() == "new\n"
