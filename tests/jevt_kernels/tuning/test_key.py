from __future__ import annotations

import dataclasses

import gemm_kernels
import kernel_contract as contract

from jevt_kernels import codegen, launch
from jevt_kernels.tuning import key

SPEC = gemm_kernels.bias_gelu((1, 64, 64, 64), contract.BFLOAT16)


def test_names_comments_and_shared_buffers_say_nothing():
    same = dataclasses.replace(SPEC, name="other", comment="{ lambda }", aliases=((0, 0),))
    assert key(SPEC, "text") == key(same, "text")
    assert len(key(SPEC)) == 32


def test_what_is_computed_of_what_and_by_whom_does(monkeypatch):
    known = {key(SPEC), key(SPEC, "text"), key(SPEC, "other text")}
    known.add(key(gemm_kernels.bias_gelu((1, 64, 64, 128), contract.BFLOAT16)))
    known.add(key(gemm_kernels.bias_gelu((1, 64, 64, 64), "float32")))
    known.add(key(gemm_kernels.product((1, 64, 64, 64), contract.BFLOAT16)))
    assert len(known) == 6


def test_another_code_generator_has_other_times(monkeypatch):
    from jevt_kernels.tuning.key import _spec

    before = key(SPEC)
    generate = codegen.generate

    def newer(spec, config=None):
        source = generate(spec, config)
        return dataclasses.replace(source, text=source.text + "# better\n")

    monkeypatch.setattr(codegen, "generate", newer)
    for cached in (launch.source_for, _spec):
        cached.cache_clear()
    try:
        assert key(SPEC) != before
    finally:
        monkeypatch.undo()
        for cached in (launch.source_for, _spec):
            cached.cache_clear()
    assert key(SPEC) == before
