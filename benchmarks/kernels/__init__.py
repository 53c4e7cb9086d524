"""The kernel suites: kernel families against XLA, over lists of shapes.

To add a suite, write a module here with a function decorated by ``case.suite`` and name the
module in ``case.MODULES``.
"""
