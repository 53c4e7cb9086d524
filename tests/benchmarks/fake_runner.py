"""A runner without a framework, that fails on demand: the variant's name says how."""

import os
import sys
import time

from benchmarks.messages import Kernel, Loaded, Profile


def device_name():
    return "NVIDIA Fake F100"


class FakeRunner:
    def __init__(self, job):
        self.behaviour = job.variant

    def load(self):
        sys.stdout.write("text on standard output must not garble the replies\n")
        if self.behaviour == "raises":
            raise ValueError("the load failed")
        if self.behaviour == "dies":
            os._exit(7)
        if self.behaviour == "hangs":
            time.sleep(60)
        if self.behaviour == "large" and not os.path.exists(os.environ["FAKE_MARK"]):
            open(os.environ["FAKE_MARK"], "w").close()
            raise MemoryError("RESOURCE_EXHAUSTED: out of memory")
        return Loaded(1.0, 0.5, 1024, 0.01, "", 0.001)

    def block(self, steps):
        if self.behaviour == "dies-later":
            os._exit(7)
        return 0.002 * steps

    def profile(self, steps):
        if self.behaviour == "no-profile":
            raise RuntimeError("no profiler here")
        return Profile((Kernel("gemm", "matmul", 1.5, 2.0),))
