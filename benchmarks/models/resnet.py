"""ResNet-50 (v1.5), NHWC, BatchNorm in training mode, running statistics returned."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.models._init import init_variables
from benchmarks.models._losses import cross_entropy
from benchmarks.models.vit import random_images
from benchmarks.options import Options
from benchmarks.shapes import RESNET, ResnetShape
from benchmarks.workload import Tree, Workload, sgd_step, training_state


class Bottleneck(nn.Module):
    """1×1, 3×3 (strided), 1×1 convolutions with BatchNorm, a shortcut, ReLU; NHWC."""

    width: int
    stride: int
    options: Options

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        o = self.options
        features = 4 * self.width
        y = nn.relu(batch_norm(o)(conv(self.width, 1, 1, o)(x)))
        y = nn.relu(batch_norm(o)(conv(self.width, 3, self.stride, o)(y)))
        y = batch_norm(o)(conv(features, 1, 1, o)(y))
        if x.shape != y.shape:
            x = batch_norm(o)(conv(features, 1, self.stride, o)(x))
        return nn.relu(x + y)


class Resnet(nn.Module):
    """Images ``[batch, image, image, channels]`` to logits ``[batch, classes]``."""

    shape: ResnetShape
    options: Options

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        s, o = self.shape, self.options
        x = nn.relu(batch_norm(o)(conv(s.width, 7, 2, o)(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(s.blocks):
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                x = Bottleneck(s.width * 2**stage, stride, o)(x)
        x = x.mean(axis=(1, 2))
        return nn.Dense(s.classes, dtype=o.dtype, param_dtype=o.param_dtype, name="head")(x)


def conv(features: int, width: int, stride: int, options: Options) -> nn.Conv:
    """A square convolution without bias, padded to keep the image's size at stride one."""
    pad = width // 2
    return nn.Conv(
        features,
        (width, width),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        dtype=options.dtype,
        param_dtype=options.param_dtype,
    )


def batch_norm(options: Options) -> nn.BatchNorm:
    """BatchNorm with batch statistics; parameters and running statistics are float32."""
    return nn.BatchNorm(
        use_running_average=False,
        momentum=0.9,
        epsilon=1e-5,
        dtype=options.dtype,
        param_dtype=jnp.float32,
    )


def make(options: Options) -> Workload:
    """The training step of ResNet-50 on random images."""
    s = RESNET[options.size]
    model = Resnet(s, options)
    size = (s.batch, s.image, s.image, s.channels)

    def init(seed: int) -> Tree:
        images = jax.ShapeDtypeStruct(size, jnp.dtype(options.dtype))
        variables = init_variables(model.init, seed, images)
        return training_state(variables["params"], variables["batch_stats"])

    def loss_fn(params: Tree, stats: Tree, batch: Tree) -> tuple[jax.Array, Tree]:
        variables = {"params": params, "batch_stats": stats}
        logits, new = model.apply(variables, batch["images"], mutable=["batch_stats"])
        return cross_entropy(logits, batch["labels"]), new["batch_stats"]

    batch = random_images(size, s.classes, options.dtype)
    return Workload("resnet", sgd_step(loss_fn), init, batch)
