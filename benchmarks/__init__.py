"""The five workloads, their subgraphs, the kernel suites and every baseline, in one command.

``python -m benchmarks --help`` tells how to run it; ``benchmarks/README.md`` tells how it works.
"""
