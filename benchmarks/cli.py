"""The command lines of the subcommands."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import registry, variants
from benchmarks.console import KERNEL_COLUMNS, STEP_COLUMNS, text_table
from benchmarks.machine import ROOT
from benchmarks.merging import merge
from benchmarks.options import ATTENTIONS, Options
from benchmarks.plan import Plan
from benchmarks.results import Header, ResultFile
from benchmarks.step_suite import StepSuite, profile_path
from benchmarks.workbench import RESULTS, open_workbench, result_path

# What a smoke run varies: small shapes, few steps, one worker per variant for all workloads.
_SMOKE_PLAN = {"steps": 2, "blocks": 2, "measure_warm": False, "profile_steps": 0}
_SMOKE_VARIANTS = "jax,jevt,floor"


def run_steps(arguments: Sequence[str]) -> int:
    """``python -m benchmarks``: times whole steps."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=run_steps.__doc__)
    _add_common(parser)
    parser.add_argument("--workloads", help="comma-separated names or groups; default models")
    parser.add_argument("--profile", action="store_true", help="also write the kernels by time")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout rate of bert")
    for option, what in (("--dtype", "the computation"), ("--param-dtype", "the parameters")):
        parser.add_argument(
            option, default="bfloat16", choices=("bfloat16", "float32"), help=f"type of {what}"
        )
    parser.add_argument("--attention", default="einsum", choices=ATTENTIONS)
    parser.add_argument("--data", help="folder with the files of ogbn-mag, for gcn")
    parser.add_argument("--no-reference", action="store_true", help="do not check gradients")
    parser.add_argument(
        "--serial", action="store_true", help="compile one variant at a time (default: two lanes)"
    )
    args = parser.parse_args(arguments)

    workloads = _parse(parser, registry.expand, args.workloads or _default_workloads(args.smoke))
    default = _SMOKE_VARIANTS if args.smoke else ",".join(_default_variants())
    names = _parse(parser, variants.check, args.variants or default)
    options = Options(
        size="smoke" if args.smoke else "full",
        dtype=args.dtype,
        param_dtype=args.param_dtype,
        dropout=args.dropout,
        attention=args.attention,
        data=args.data,
    )
    plan = _plan(args, options, serial=args.serial, reference=not args.no_reference)
    uses_torch = any(v in variants.VARIANTS and variants.VARIANTS[v].lane == "torch" for v in names)
    with open_workbench(
        options.size,
        share=args.smoke,
        with_ceilings=variants.FLOOR in names,
        with_torch=uses_torch,
        torch_python=args.torch_python,
        torch_path=args.torch_path,
        commit=args.commit,
    ) as bench:
        path = result_path(_target(args), bench.header.device)
        file = ResultFile(path, bench.header, ("workload", "variant"), merge=args.merge)
        profile = None
        if args.profile:
            key = ("workload", "variant", "name")
            profile = ResultFile(profile_path(path), bench.header, key, merge=args.merge)
        StepSuite(plan, bench, file, profile).run(workloads, names)
    print(text_table(file.rows, STEP_COLUMNS))
    _print_header(bench.header, path)
    return 0


def run_kernels(arguments: Sequence[str]) -> int:
    """``python -m benchmarks kernels``: times kernel families against XLA."""
    from benchmarks.kernels.suite import list_cases, run_cases

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks kernels", description=run_kernels.__doc__
    )
    _add_common(parser)
    parser.add_argument("--suites", default="", help="comma-separated; default all")
    parser.add_argument("--cases", default="", help="comma-separated parts of names; default all")
    parser.add_argument("--configs", type=int, help="configurations of a kernel to try at most")
    parser.add_argument("--search-limit", type=float, help="seconds to compile configurations")
    args = parser.parse_args(arguments)

    names = _parse(parser, variants.check, args.variants or "jax,jevt")
    if wrong := set(names) - {"jax", "jevt"}:
        parser.error(f"variants: kernel suites have jax, jevt and their peers; got {wrong.pop()}")
    options = Options(size="smoke" if args.smoke else "full")
    suites = [s for s in args.suites.split(",") if s]
    try:
        wanted = args.cases.split(",")
        listed = list_cases(options.size, suites)
        infos = [c for c in listed if any(part in c.name for part in wanted)]
    except ValueError as error:
        parser.error(str(error))
    # Many calls under the profiler: a call lasts microseconds, and the profile is the measurement.
    profiled = 0 if args.smoke else 24
    changes = {"configs": args.configs, "search_s": args.search_limit}
    changes = {name: value for name, value in changes.items() if value is not None}
    changes |= {"block_s": 0.05, "measure_warm": False, "profile_steps": profiled}
    plan = _plan(args, options, **changes)
    with open_workbench(
        options.size, share=True, with_ceilings=True, with_torch=False, commit=args.commit
    ) as bench:
        path = result_path(_target(args), bench.header.device, "-kernels")
        key = ("suite", "case", "variant")
        file = ResultFile(path, bench.header, key, merge=args.merge)
        run_cases(infos, names, plan, bench, file)
    print(text_table(file.rows, KERNEL_COLUMNS))
    _print_header(bench.header, path)
    return 0


def run_report(arguments: Sequence[str]) -> int:
    """``python -m benchmarks report``: renders the result files."""
    from benchmarks.report import render

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report", description=run_report.__doc__
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--figures", type=Path, help="folder of the PNGs; default --results")
    args = parser.parse_args(arguments)
    for path in render.render(args.results, args.readme, args.figures or args.results):
        print(path)
    return 0


def run_merge(arguments: Sequence[str]) -> int:
    """``python -m benchmarks merge``: writes a later run's rows into an earlier run's file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks merge", description=run_merge.__doc__
    )
    parser.add_argument("earlier", type=Path, help="the file that is rewritten")
    parser.add_argument("later", type=Path, help="the file of the later run")
    parser.add_argument("--commit", help="commit of the later run, where that did not know it")
    args = parser.parse_args(arguments)
    try:
        rows = merge(args.earlier, args.later, args.commit)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.earlier}: {len(rows)} rows")
    return 0


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variants", help=f"comma-separated, of {', '.join(variants.NAMES)}")
    parser.add_argument("--json", help="result file, or folder for one named by the device")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--merge", action="store_true", help="keep the file's comparable rows")
    parser.add_argument("--steps", type=int, help="steps per block; default by time")
    parser.add_argument("--blocks", type=int, help="timed blocks per variant")
    parser.add_argument("--time-limit", type=float, help="seconds for one variant of one workload")
    parser.add_argument("--total-limit", type=float, help="seconds; nothing is started after them")
    parser.add_argument("--no-warm", action="store_true", help="do not measure warm starts")
    parser.add_argument("--torch-python", help="interpreter of the PyTorch variants")
    parser.add_argument("--torch-path", help="PYTHONPATH of the PyTorch variants; may be empty")
    parser.add_argument("--commit", help="commit to record, where there is no git")


def _target(args: argparse.Namespace) -> str | None:
    """Where to write; a smoke run never lands among the results by default."""
    return args.json or (tempfile.gettempdir() + os.sep if args.smoke else None)


def _plan(args: argparse.Namespace, options: Options, **changes: object) -> Plan:
    """Defaults, then smoke's, then the suite's, then what the command line says."""
    settings: dict[str, object] = dict(_SMOKE_PLAN) if args.smoke else {}
    settings |= changes
    given = {
        "steps": args.steps,
        "blocks": args.blocks,
        "time_limit_s": args.time_limit,
        "total_limit_s": args.total_limit,
        "measure_warm": False if args.no_warm else None,
    }
    settings |= {name: value for name, value in given.items() if value is not None}
    return Plan(options=options, **settings)  # type: ignore[arg-type]


def _default_workloads(smoke: bool) -> str:
    return "models,gcn-bcoo,vit-nnx,subgraphs" if smoke else "models"


def _default_variants() -> list[str]:
    return [name for name in variants.NAMES if name != "inductor-max"]


def _parse(parser: argparse.ArgumentParser, function, text: str) -> list[str]:
    try:
        return function([name for name in text.split(",") if name])
    except ValueError as error:
        parser.error(str(error))


def _print_header(header: Header, path: Path) -> None:
    versions = ", ".join(f"{k} {v}" for k, v in header.versions.items())
    print(f"\n{header.device} · commit {header.commit} · {header.date}\n{versions}\n{path}")
