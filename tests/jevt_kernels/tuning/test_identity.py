from __future__ import annotations

import jax
import pytest

from jevt_kernels.tuning import Identity, identity


class Gpu:
    device_kind = "NVIDIA H100 80GB HBM3"
    compute_capability = "9.0"


def test_no_gpu(monkeypatch):
    def none(backend):
        raise RuntimeError("Unknown backend")

    monkeypatch.setattr(jax, "local_devices", none)
    assert identity.local() is None


def test_the_first_gpu(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda backend: [Gpu()])
    found = identity.local()
    assert (found.device, found.capability) == ("NVIDIA H100 80GB HBM3", 90)
    assert {"jaxlib", "triton", "jax-triton"} <= dict(found.versions).keys()


def test_the_drivers_version_where_it_can_be_seen(tmp_path):
    path = tmp_path / "version"
    assert "driver" not in dict(identity.versions(path))
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue Sep 3 UTC\n")
    assert dict(identity.versions(path))["driver"] == "580.159.04"
    path.write_text("something else")
    assert "driver" not in dict(identity.versions(path))


@pytest.mark.parametrize("name", ["NVIDIA H100", "../../etc/passwd", "", "日本", "x" * 300])
def test_file_names(name):
    slug = Identity(name, 90).slug
    assert len(slug) < 90
    assert slug.replace("-", "").isascii() and slug.replace("-", "").isalnum()
    assert slug != Identity(name, 90, (("jaxlib", "1"),)).slug
