"""The pipeline: the flat, ordered, named list of stages, and one function that runs it."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from jax.extend.core import Jaxpr, check_jaxpr

from jevt._config import Environment, Options
from jevt._context import Backend, Context
from jevt.lowering import emit
from jevt.partition import Plan, fallbacks, partition
from jevt.passes import (
    add_products,
    canonicalize,
    chunk_logits,
    convolutions,
    cse,
    dce,
    eliminate_reductions,
    expand_composites,
    expose_random_bits,
    fold_constants,
    hoist_orders,
    inline,
    keep_derivatives,
    key_sums,
    max_pools,
    merge_convolutions,
    one_hot,
    product_norms,
    raise_attention,
    raise_cross_entropy,
    raise_norms,
    raise_softmax,
    relu_masks,
    row_products,
    segment_epilogues,
    segment_sums,
    separate_products,
    sink_constants,
    slices,
    space_to_depth,
    sparse_products,
    split_concatenations,
    split_products,
    table_gradient,
)
from jevt.report import text
from jevt.report.trace import Stage, Trace
from jevt.tuning import improve
from jevt_kernels import launch

type Pass = Callable[[Jaxpr], Jaxpr]

# Every result evaluates anywhere with `jax.core.eval_jaxpr(jaxpr, jaxpr.consts, *args)`.
GRAPH_PASSES: tuple[tuple[str, Pass], ...] = (
    # Calls become the equations that they call, up to the barriers of `checkpoint`.
    ("inline", inline.run),
    # Random bits become arithmetic on positions.
    ("random_bits", expose_random_bits.run),
    # What no output needs goes.
    ("dce", dce.run),
    # What is computed twice is computed once.
    ("cse", cse.run),
    # What depends on no input becomes a literal.
    ("fold_constants", fold_constants.run),
    # Each thing is said in one way: what autodiff and numerically careful code leave behind goes.
    ("canonicalize", canonicalize.run),
    # Parts of an array are slices of it, and join by concatenation.
    ("slices", slices.run),
    # One element a row, by position, becomes arithmetic on the row.
    ("one_hot", one_hot.run),
    # Sums whose value is known, or that a cheaper sum gives, go.
    ("eliminate_reductions", eliminate_reductions.run),
    # What the three have made equal is computed once, and what has lost its readers goes.
    ("cse", cse.run),
    ("dce", dce.run),
)

# After the raising ones, for GPUs only, where groups become kernels: what has neighbours to share
# one with.
PRODUCT_PASSES: tuple[tuple[str, Pass], ...] = (
    # Convolutions that are matrix products become such.
    ("convolutions", convolutions.run),
    # Strided ones of images of few channels become products, or convolutions of many channels.
    ("space_to_depth", space_to_depth.run),
)

# After them, on every platform.
EXPANDING_PASSES: tuple[tuple[str, Pass], ...] = (
    # Composites that nothing takes whole become equations again.
    ("expand_composites", expand_composites.run),
    ("cse", cse.run),
    ("dce", dce.run),
)

# After them, for GPUs only: what a CPU would not gain from.
GPU_PASSES: tuple[tuple[str, Pass], ...] = (
    # What a relu reads is not kept for its gradient's mask.
    ("relu_masks", relu_masks.run),
    # Gradients of maximum pooling become arithmetic on shifted arrays.
    ("max_pools", max_pools.run),
    # Gradients of lookups in short tables become matrix products.
    ("table_gradient", table_gradient.run),
    # What both have made equal is computed once, and what they have left without a reader goes.
    ("cse", cse.run),
    ("dce", dce.run),
)


def graph_passes(
    context: Context, note: Callable[[str], None] = lambda _: None
) -> tuple[tuple[str, Pass], ...]:
    """The graph passes of one compilation, in order.

    Args:
      context: for whom the program is compiled.
      note: receives what a pass has to say of the program, such as what it nearly recognised.
    """
    if context.platform not in ("cuda", "rocm"):
        return GRAPH_PASSES + _raising_passes(context, note) + EXPANDING_PASSES
    attention = _attention_passes(context, note) if context.platform == "cuda" else ()
    grouped = context.backend in ("auto", "triton") and not context.partitioned
    products = _product_passes(context, note) if grouped else ()
    products += EXPANDING_PASSES
    own = _kernel_passes(context, note) if context.own_kernels else ()
    passes = GRAPH_PASSES + attention + _raising_passes(context, note) + products + GPU_PASSES + own
    return passes + _splitting_passes(context) + (_adding_passes(context) if grouped else ())


def _attention_passes(
    context: Context, note: Callable[[str], None]
) -> tuple[tuple[str, Pass], ...]:
    """Passes that leave attention to cuDNN and to a kernel of ours."""
    return (
        # What depends on no input is known inside loops too.
        ("sink_constants", sink_constants.run),
        # The equations of an attention become one forward and one backward.
        ("raise_attention", functools.partial(raise_attention.run, context=context, note=note)),
        # Masks that layers share are made once; scores and probabilities have no reader left.
        ("cse", cse.run),
        ("dce", dce.run),
    )


def _raising_passes(context: Context, note: Callable[[str], None]) -> tuple[tuple[str, Pass], ...]:
    """Passes that bring what programs spell in many ways to its one best spelling.

    They come after that of attention, whose softmaxes are its own.
    """
    return (
        # Statistics and gradients of norms become composites.
        ("raise_norms", functools.partial(raise_norms.run, note=note)),
        # So do those of softmaxes.
        ("raise_softmax", functools.partial(raise_softmax.run, note=note)),
        # What they compute of the same rows is computed once; what they replace has no reader left.
        ("cse", cse.run),
        ("dce", dce.run),
        # Cross entropies, around the statistics of their softmaxes, are spelled in one way.
        ("raise_cross_entropy", functools.partial(raise_cross_entropy.run, note=note)),
        # Where logits would fill the memory, loss and gradient go by chunks of tokens.
        ("chunk_logits", functools.partial(chunk_logits.run, context=context, note=note)),
    )


def _product_passes(context: Context, note: Callable[[str], None]) -> tuple[tuple[str, Pass], ...]:
    """Passes for convolutions, and those that take norms whole: products must be such by then."""
    norms = functools.partial(product_norms.run, context=context, note=note)
    return (
        *PRODUCT_PASSES,
        # Convolutions of one input with few filters each become one.
        ("merge_convolutions", functools.partial(merge_convolutions.run, context=context)),
        # Forward and backward pass read the same views of a product's operands.
        ("cse", cse.run),
        # Batch norms of products are computed without the product in memory.
        ("product_norms", norms),
        ("dce", dce.run),
    )


def _kernel_passes(context: Context, note: Callable[[str], None]) -> tuple[tuple[str, Pass], ...]:
    """Passes that put in equations which run as kernels of their own."""
    capability = context.device.compute_capability
    sums = functools.partial(segment_sums.run, capability=capability, note=note)
    return (
        # Products with sparse arrays become gathers, products and scatters that add.
        ("sparse_products", functools.partial(sparse_products.run, note=note)),
        # Layers share a matrix's columns of indices.
        ("cse", cse.run),
        # Scatters that add become sums of segments; indices are sorted once.
        ("segment_sums", sums),
        # What is left of lookups on edges: the gradients of weights.
        ("row_products", functools.partial(row_products.run, capability=capability)),
        # Loops over layers sort once, before the loop.
        ("hoist_orders", hoist_orders.run),
        ("cse", cse.run),
        ("dce", dce.run),
        # What is added to sums of segments, and their activations, join their kernels.
        ("segment_epilogues", segment_epilogues.run),
        ("dce", dce.run),
    )


def _splitting_passes(context: Context) -> tuple[tuple[str, Pass], ...]:
    """Passes for what calls read and write as arrays of its own; after all that put in calls."""
    return (
        # Products that are read in parts become a product for each part.
        ("split_products", functools.partial(split_products.run, context=context)),
        # Products that read a concatenation become a product for each part of it.
        ("split_concatenations", functools.partial(split_concatenations.run, context=context)),
        # Slices of the same columns are one product; nobody reads the whole.
        ("cse", cse.run),
        ("dce", dce.run),
        # Sums of keys' gradients over all tokens are 0.
        ("key_sums", functools.partial(key_sums.run, context=context)),
        ("cse", cse.run),
        ("dce", dce.run),
        # XLA does not put large products together again that share an operand.
        ("separate_products", functools.partial(separate_products.run, context=context)),
        ("dce", dce.run),
    )


def _adding_passes(context: Context) -> tuple[tuple[str, Pass], ...]:
    """Passes that put in what only a kernel of ours computes at once."""
    return (
        # The backward pass reads derivatives of activations, which the forward pass has at hand.
        ("keep_derivatives", functools.partial(keep_derivatives.run, context=context)),
        # Products that are added up are multiplied into one sum.
        ("add_products", functools.partial(add_products.run, context=context)),
        ("dce", dce.run),
    )


class StrictError(RuntimeError):
    """Under ``strict=True``: groups run through XLA although the cost model did not decide so."""


def make_context(
    options: Options, platforms: Sequence[str], donated: tuple[bool, ...], partitioned: bool
) -> Context:
    """What the stages may know of a program that is lowered for ``platforms``.

    A program for several platforms at once is left to XLA, which has one text for all of them.
    """
    platform = platforms[0]
    backend: Backend = options.backend if len(platforms) == 1 else "xla"
    environment, tune = options.environment, options.tune == "on" and backend != "xla"
    device, known, tune = improve.consult(platform, environment.cache_dir, tune)
    return Context(
        platform=platform,
        backend=backend,
        strict=options.strict,
        donated=donated,
        device=device,
        partitioned=partitioned,
        fuel=environment.fuel,
        check=environment.check,
        known=known,
        tune=tune,
    )


# Weak in the jaxpr: a trace lives as long as the function that it was made for.
_cache: weakref.WeakKeyDictionary[Jaxpr, dict[Context, Trace]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def compile(  # noqa: A001 - what it is called everywhere
    jaxpr: Jaxpr,
    context: Context,
    name: str = "step",
    environment: Environment | None = None,
    lazy: tuple[str, ...] = (),
) -> Trace:
    """Runs all stages.

    Args:
      jaxpr: the program as it was traced.
      context: for whom it is compiled.
      name: of the function, for reports.
      environment: what to print and to write.
      lazy: names of outputs that have been left out of the jaxpr, for reports.

    Raises:
      StrictError: ``context.strict``, and a group fell back.
    """
    with _lock:
        trace = _cache.get(jaxpr, {}).get(context)
    if trace is None:
        environment = environment or Environment()
        trace = _run(jaxpr, context, name, lazy, environment)
        # What was measured on the way does not have to be planned with once more.
        afterwards = dataclasses.replace(context, known=trace.context.known)
        with _lock:
            _cache.setdefault(jaxpr, {}).update({context: trace, afterwards: trace})
        text.publish(trace, environment)
    if context.strict and trace.warnings:
        raise StrictError(
            f"jevt.jit(strict=True): {len(trace.warnings)} groups of {name} would run through XLA"
            " for other reasons than the cost model's:\n"
            + "".join(f"  - {line}\n" for line in trace.warnings)
            + "Change the equations named above, or drop strict=True to run them through XLA."
        )
    return trace


def _run(
    jaxpr: Jaxpr, context: Context, name: str, lazy: tuple[str, ...], environment: Environment
) -> Trace:
    # A copy, which shares the equations: a trace that held the cache's key would never be freed.
    stages = [Stage("trace", 0.0, jaxpr.with_consts(jaxpr.consts))]
    notes: list[str] = []
    for stage_name, graph_pass in graph_passes(context, notes.append):
        start = time.perf_counter()
        result = graph_pass(stages[-1].jaxpr)
        stages.append(Stage(stage_name, _since(start), result, tuple(notes)))
        notes.clear()
        if context.check:
            _check(result, stage_name)

    # Constants of called functions are inputs to the planner, and constants again afterwards.
    program = stages[-1].jaxpr
    consts = program.consts
    program = program.with_consts(())
    context = dataclasses.replace(context, donated=(False,) * len(consts) + context.donated)

    start = time.perf_counter()
    if context.tune:
        planner = functools.partial(partition, program)
        plan, context, failed = improve.improve(planner, context, environment.cache_dir)
        notes.extend(failed)
    else:
        plan = partition(program, context)
    stages.append(Stage("partition", _since(start), plan.jaxpr, tuple(notes)))

    start = time.perf_counter()
    lowered, plan = emit.lower(plan, context)
    stages.append(Stage("lower", _since(start), lowered.with_consts(consts)))

    return Trace(
        name=name,
        context=context,
        stages=tuple(stages),
        plan=plan,
        sources=_sources(plan),
        warnings=tuple(dict.fromkeys(f"{g.name}: {g.reason}" for g in fallbacks(plan))),
        lazy=lazy,
    )


def _sources(plan: Plan, prefix: str = "") -> dict[str, str]:
    """Generated source by group; groups of bodies under the position of their equation."""
    sources = {
        prefix + group.name: launch.source_for(group.spec, group.config).text
        for group in plan.groups
        if group.target == "triton" and group.spec is not None
    }
    for (position, body), nested in plan.nested:
        sources |= _sources(nested, f"{prefix}{position}.{body}/")
    return sources


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


def _check(jaxpr: Jaxpr, stage: str) -> None:
    try:
        check_jaxpr(jaxpr)
    except Exception as error:
        raise AssertionError(
            f"JEVT_CHECK: pass {stage!r} made an ill-typed jaxpr: {error}"
        ) from error
