"""Matrix products of BERT, ViT and XML-CNN, alone and with what surrounds them in a training step.

A case has the function, which XLA compiles, and the kernel, written by hand: what is measured is
kernels, not what a compiler makes of the function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.kernels import gemm_shapes as shapes
from benchmarks.kernels.case import Case, suite
from benchmarks.kernels.gemm_shapes import Product
from benchmarks.models.xmlcnn import multi_hot
from benchmarks.options import Size
from benchmarks.shapes import BERT, VIT, XMLCNN
from benchmarks.workload import Tree
from jevt_kernels.by_hand import GemmTree
from jevt_kernels.spec import KernelSpec

FLOAT = jnp.dtype("float32")
DTYPE = jnp.dtype("bfloat16")

#: Of a step of SGD.
RATE = 1e-3


@dataclass(frozen=True)
class Input:
    """An operand beside the two of the product: its axes, dtype, and what it is drawn like."""

    layout: str
    dtype: Any = DTYPE
    scale: float = 1.0
    draw: Callable[[jax.Array, tuple[int, ...]], jax.Array] | None = None


@dataclass(frozen=True)
class Epilogue:
    """What happens to a product.

    Attributes:
      name: short.
      function: of the product, in float32 arithmetic, and the further operands; gives the results.
      tree: adds the same to a tree, given the product and the further operands.
      inputs: the further operands.
    """

    name: str
    function: Callable[..., Tree]
    tree: Callable[..., None]
    inputs: tuple[Input, ...] = ()


def _product(p: Product, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(p.subscripts, x, y)


def make_case(p: Product, e: Epilogue, suffix: str = "") -> Case:
    """The case of a product and its epilogue, in bfloat16."""

    def function(x: jax.Array, y: jax.Array, *others: jax.Array) -> Tree:
        return e.function(_product(p, x, y), *others)

    def args(seed: int) -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.PRNGKey(seed), 2 + len(e.inputs))
        x = jax.random.normal(keys[0], p.shape(p.lhs), DTYPE)
        y = jax.random.normal(keys[1], p.shape(p.rhs), DTYPE) * p.count(p.k) ** -0.5
        others = []
        for key, i in zip(keys[2:], e.inputs, strict=True):
            shape = p.shape(i.layout)
            if i.draw is not None:
                others.append(i.draw(key, shape).astype(i.dtype))
            else:
                others.append(jax.random.normal(key, shape, i.dtype) * i.scale)
        return x, y.astype(DTYPE), *others

    def kernel() -> KernelSpec:
        tree = GemmTree(p.sizes, batch=p.batch, m=p.m, n=p.n, k=p.k)
        value = tree.contract(tree.load(p.lhs, DTYPE), tree.load(p.rhs, DTYPE))
        if e is not PLAIN:  # as in a plan: rounded where the function rounds it
            value = tree.compute("convert", value, dtype=DTYPE)
        e.tree(tree, p, value, *(tree.load(i.layout, i.dtype) for i in e.inputs))
        return tree.spec("gemm_" + e.name)

    results = jax.eval_shape(function, *jax.eval_shape(lambda: args(0)))
    operands = (*jax.eval_shape(lambda: args(0)), *jax.tree.leaves(results))
    return Case(
        p.name + suffix,
        function,
        args,
        bytes=sum(x.size * x.dtype.itemsize for x in operands),
        flops=p.flops,
        batches=2 if p.name.startswith("xmlcnn-labels") else 3,
        kernel=kernel,
    )


# Epilogues: the function, and the same as a tree


def _store(t: GemmTree, p: Product, value: int) -> None:
    t.store(value, p.out, DTYPE)


PLAIN = Epilogue("plain", lambda z: z, _store)


def _spread(p: Product, bias: jax.Array) -> jax.Array:
    """A bias, with axes of one element where the result has rows."""
    return bias.reshape([p.sizes[a] if a in p.n else 1 for a in p.out])


def _bias_tree(t: GemmTree, p: Product, z: int, bias: int) -> None:
    _store(t, p, t.compute("add", z, bias))


def _gelu_tree(t: GemmTree, p: Product, z: int, bias: int) -> None:
    h = t.compute("add", z, bias)
    _store(t, p, h)
    tail = t.compute("erfc", t.compute("mul", h, t.constant(-(0.5**0.5))))
    _store(t, p, t.compute("mul", t.compute("mul", h, t.constant(0.5)), tail))


def _gelu(z: jax.Array, bias: jax.Array) -> Tree:
    h = z + bias
    return h, jax.nn.gelu(h, approximate=False)


def _residual_tree(t: GemmTree, p: Product, z: int, bias: int, residual: int) -> None:
    _store(t, p, t.compute("add", t.compute("add", z, bias), residual))


def _add_tree(t: GemmTree, p: Product, z: int, other: int) -> None:
    _store(t, p, t.compute("add", z, other))


def _gelu_gradient(z: jax.Array, h: jax.Array) -> Tree:
    _, vjp = jax.vjp(functools.partial(jax.nn.gelu, approximate=False), h)
    (dh,) = vjp(z)
    return dh, dh.astype(FLOAT).sum(0)


def _gelu_gradient_tree(t: GemmTree, p: Product, z: int, h: int) -> None:
    square = t.compute("mul", t.compute("mul", h, h), t.constant(-0.5))
    density = t.compute("mul", t.compute("exp", square), t.constant(0.3989422804014327))
    tail = t.compute("erfc", t.compute("mul", h, t.constant(-(0.5**0.5))))
    half = t.compute("mul", tail, t.constant(0.5))
    slope = t.compute("add", half, t.compute("mul", h, density))
    _gradient_stores(t, p, t.compute("mul", z, slope))


def _gradient_stores(t: GemmTree, p: Product, value: int) -> None:
    """A gradient, and that of the bias: its sum over rows."""
    _store(t, p, value)
    t.store(t.reduce(value, "m"), p.n, FLOAT)


def _relu_gradient(z: jax.Array, h: jax.Array) -> Tree:
    dh = jnp.where(h > 0, z, 0)
    return dh, dh.astype(FLOAT).sum(0)


def _relu_gradient_tree(t: GemmTree, p: Product, z: int, h: int) -> None:
    zero = t.constant(0.0)
    positive = t.compute("gt", h, zero, dtype=bool)
    _gradient_stores(t, p, t.compute("select_n", positive, zero, z))


def _sgd(z: jax.Array, w: jax.Array, rate: jax.Array) -> Tree:
    return (w.astype(FLOAT) - rate * z.astype(FLOAT)).astype(w.dtype)


def _sgd_tree(t: GemmTree, p: Product, z: int, w: int, rate: int) -> None:
    _store(t, p, t.compute("sub", w, t.compute("mul", rate, z)))


def _relu_tree(t: GemmTree, p: Product, z: int, bias: int) -> None:
    _store(t, p, t.compute("max", t.compute("add", z, bias), t.constant(0.0)))


def _label_gradient(z: jax.Array, bias: jax.Array, y: jax.Array) -> Tree:
    """Of the sigmoid cross entropy, by the logits and their bias."""
    logits = (z + bias).astype(FLOAT)
    d = (jax.nn.sigmoid(logits) - y) / z.shape[0]
    return d.astype(z.dtype), d.sum(0)


def _label_gradient_tree(t: GemmTree, p: Product, z: int, bias: int, y: int) -> None:
    d = t.compute("sub", t.compute("logistic", t.compute("add", z, bias)), y)
    _gradient_stores(t, p, t.compute("mul", d, t.constant(1 / p.sizes["t"])))


def _scale_tree(t: GemmTree, p: Product, z: int) -> None:
    _store(t, p, t.compute("mul", z, t.constant(p.sizes["d"] ** -0.5)))


def _bias(p: Product) -> Input:
    return Input(p.n, scale=0.1)


def bias(p: Product) -> Case:
    """x·w + b."""
    e = Epilogue("bias", lambda z, b: z + _spread(p, b), _bias_tree, (_bias(p),))
    return make_case(p, e, "-bias")


def bias_gelu(p: Product) -> Case:
    """h = x·w + b and gelu(h)."""
    return make_case(p, Epilogue("bias_gelu", _gelu, _gelu_tree, (_bias(p),)), "-gelu")


def bias_relu(p: Product) -> Case:
    """relu(x·w + b)."""
    e = Epilogue("bias_relu", lambda z, b: jax.nn.relu(z + b), _relu_tree, (_bias(p),))
    return make_case(p, e, "-relu")


def bias_residual(p: Product) -> Case:
    """x·w + b + r."""
    e = Epilogue("residual", lambda z, b, r: z + b + r, _residual_tree, (_bias(p), Input(p.out)))
    return make_case(p, e, "-residual")


def plus(p: Product) -> Case:
    """dy·wᵀ + the gradient that comes another way."""
    return make_case(p, Epilogue("add", lambda z, r: z + r, _add_tree, (Input(p.out),)), "-add")


def gelu_gradient(p: Product) -> Case:
    """dh = dy·wᵀ · gelu'(h), and the gradient of the bias."""
    e = Epilogue("gelu_gradient", _gelu_gradient, _gelu_gradient_tree, (Input(p.out),))
    return make_case(p, e, "-gelu")


def relu_gradient(p: Product) -> Case:
    """dh = dy·wᵀ where h > 0, and the gradient of the bias."""
    e = Epilogue("relu_gradient", _relu_gradient, _relu_gradient_tree, (Input(p.out),))
    return make_case(p, e, "-relu")


def sgd(p: Product) -> Case:
    """w - rate · xᵀ·dy."""
    rate = Input("", FLOAT, draw=lambda key, shape: jnp.full(shape, RATE))
    e = Epilogue("sgd", _sgd, _sgd_tree, (Input(p.out, scale=0.1), rate))
    return make_case(p, e, "-sgd")


def label_gradient(p: Product, positives: int) -> Case:
    """sigmoid(x·w + b) - y over the batch, and its sum."""
    labels = Input(p.out, FLOAT, draw=lambda key, shape: multi_hot(key, *shape, positives))
    e = Epilogue("labels", _label_gradient, _label_gradient_tree, (_bias(p), labels))
    return make_case(p, e, "-gradient")


def scaled(p: Product) -> Case:
    """q·kᵀ / sqrt(d)."""
    e = Epilogue("scaled", lambda z: z * p.sizes["d"] ** -0.5, _scale_tree)
    return make_case(p, e, "-scaled")


def split_heads(tokens: int, inputs: int, batch: int, heads: int) -> Product:
    """The queries by head, from tokens [batch, length]."""
    sizes = {"b": batch, "l": tokens // batch, "i": inputs, "h": heads, "d": inputs // heads}
    return Product("bert-queries-fwd", sizes, "bli", "ihd", "bhld")


@suite("gemm")
def gemm(size: Size) -> Sequence[Case]:
    """The products alone."""
    cases = [make_case(p, PLAIN) for p in shapes.products(size)]
    return cases if size == "full" else cases[::8]


@suite("gemm-epilogue")
def gemm_epilogue(size: Size) -> Sequence[Case]:
    """The products with what a training step does to their results."""
    cases = epilogues(size)
    return cases if size == "full" else cases[::8]


def epilogues(size: Size) -> list[Case]:
    """All cases of the second suite."""
    s, v, x = BERT[size], VIT[size], XMLCNN[size]
    tokens, patches = s.batch * s.sequence, v.batch * v.tokens
    features = len(x.widths) * x.pooled * x.filters
    return [
        bias(split_heads(tokens, s.hidden, s.batch, s.heads)),
        scaled(shapes.scores(s)),
        bias_residual(shapes.forward("bert-projection", tokens, s.hidden, s.hidden)),
        bias_gelu(shapes.forward("bert-up", tokens, s.hidden, s.ffn)),
        bias_residual(shapes.forward("bert-down", tokens, s.ffn, s.hidden)),
        plus(shapes.dgrad("bert-projection", tokens, s.hidden, s.hidden)),
        gelu_gradient(shapes.dgrad("bert-down", tokens, s.ffn, s.hidden)),
        plus(shapes.dgrad("bert-up", tokens, s.hidden, s.ffn)),
        sgd(shapes.wgrad("bert-projection", tokens, s.hidden, s.hidden)),
        sgd(shapes.wgrad("bert-up", tokens, s.hidden, s.ffn)),
        sgd(shapes.wgrad("bert-down", tokens, s.ffn, s.hidden)),
        bias(shapes.forward("vit-qkv", patches, v.hidden, 3 * v.hidden)),
        bias_residual(shapes.forward("vit-projection", patches, v.hidden, v.hidden)),
        bias_gelu(shapes.forward("vit-up", patches, v.hidden, v.ffn)),
        bias_residual(shapes.forward("vit-down", patches, v.ffn, v.hidden)),
        gelu_gradient(shapes.dgrad("vit-down", patches, v.ffn, v.hidden)),
        plus(shapes.dgrad("vit-up", patches, v.hidden, v.ffn)),
        sgd(shapes.wgrad("vit-up", patches, v.hidden, v.ffn)),
        sgd(shapes.wgrad("vit-down", patches, v.ffn, v.hidden)),
        bias_relu(shapes.forward("xmlcnn-hidden", x.batch, features, x.hidden)),
        label_gradient(shapes.forward("xmlcnn-labels", x.batch, x.hidden, x.labels), x.positives),
        relu_gradient(shapes.dgrad("xmlcnn-labels", x.batch, x.hidden, x.labels)),
        sgd(shapes.wgrad("xmlcnn-labels", x.batch, x.hidden, x.labels)),
    ]
