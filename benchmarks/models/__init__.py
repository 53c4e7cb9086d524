"""The five workloads as ordinary Flax models. Each module has ``make(options) -> Workload``."""
