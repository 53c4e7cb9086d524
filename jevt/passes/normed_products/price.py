"""Predicted microseconds that a batch norm of a product saves without the product in memory."""

from __future__ import annotations

from jevt._context import Device
from jevt.passes.normed_products.match import NormedProduct

#: How often 16-bit arrays of the product's size pass through memory that do not any more: y written
#: and read by what is normalised; y read by the gradient's sum; dy made of g and y.
_PASSED = 6

#: Least columns of the product for each of x. With fewer, x and what is made of it are as large.
_RATIO = 2

#: Small kernels more than before.
_LAUNCHES = 10

#: How often float32 arrays of W's size pass through memory: xᵀy and xᵀg, written, read for the
#: norm's sums and for the weight's gradient, and the matrices for the product with W.
_WEIGHTS = 8


def saved_us(found: NormedProduct, device: Device) -> float:
    """By how much the predicted time is less."""
    m, c, n = found.sizes
    if n < _RATIO * c:
        return 0.0
    product = m * n * 2
    saved = _PASSED * product / device.bytes_per_us
    # xᵀx, and the sum of x, if no kernel that makes x takes it along.
    added = _product_us(2 * m * c * c, m * c * 2, device) + m * c * 2 / device.bytes_per_us
    # The gradient with respect to x.
    added += _product_us(2 * m * c * (n + 2 * c), product + 2 * m * c * 2, device)
    added -= _product_us(2 * m * c * n, product + m * c * 2, device)
    # What is left of the arithmetic is of W's size.
    added += 4 * _product_us(2 * c * c * n, 0, device) + _WEIGHTS * c * n * 4 / device.bytes_per_us
    return saved - added - _LAUNCHES * device.xla_launch_us


def _product_us(flops: int, moved: int, device: Device) -> float:
    return max(flops / device.cublas_flops_per_us, moved / device.bytes_per_us)
