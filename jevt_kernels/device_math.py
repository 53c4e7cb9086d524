"""Triton functions that generated kernels call, where one expression would not be readable.

Integer functions follow XLA's definitions at the edges that C leaves undefined.
"""

# Triton compiles these functions: their parameters have no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice


@triton.jit
def int_div(x, y):
    """Truncating division; x / 0 is -1 (all bits set), the smallest integer over -1 is itself."""
    zero = y == 0
    # Dividing by -1 as a negation keeps the one overflowing case defined.
    minus_one = y == -1 if x.dtype.is_int_signed() else zero
    safe = tl.where(zero | minus_one, y * 0 + 1, y)
    quotient = x // safe
    negated = 0 - x
    quotient = tl.where(minus_one & (zero == 0), negated, quotient)
    return tl.where(zero, quotient * 0 - 1, quotient)


@triton.jit
def int_rem(x, y):
    """Remainder with the sign of ``x``; x % 0 is x."""
    zero = y == 0
    minus_one = y == -1 if x.dtype.is_int_signed() else zero
    safe = tl.where(zero | minus_one, y * 0 + 1, y)
    remainder = x % safe
    return tl.where(zero, x, remainder)


@triton.jit
def float_to_int(x, low: tl.constexpr, high: tl.constexpr, dtype: tl.constexpr):
    """Truncates towards zero; out of range saturates, NaN gives 0."""
    inside = (x > low) & (x < high)
    result = tl.where(inside, x, 0.0).to(dtype)
    result = tl.where(x >= high, tl.cast(high, dtype), result)
    return tl.where(x <= low, tl.cast(low, dtype), result)


@triton.jit
def shift_left(x, amount, bits: tl.constexpr):
    """Shifting by the width or more gives 0."""
    inside = (amount >= 0) & (amount < bits)
    return tl.where(inside, x << tl.where(inside, amount, amount * 0), x * 0)


@triton.jit
def shift_right(x, amount, bits: tl.constexpr):
    """Logical shift of an unsigned ``x``; by the width or more gives 0."""
    inside = (amount >= 0) & (amount < bits)
    return tl.where(inside, x >> tl.where(inside, amount, amount * 0).to(x.dtype), x * 0)


@triton.jit
def shift_right_arithmetic(x, amount, bits: tl.constexpr):
    """Arithmetic shift of a signed ``x``; by the width or more gives the sign."""
    inside = (amount >= 0) & (amount < bits)
    return x >> tl.where(inside, amount, amount * 0 + (bits - 1)).to(x.dtype)


@triton.jit
def sign(x):
    """-1, 0 or 1; of a float, NaN and signed zeros pass through."""
    one = (x == x).to(x.dtype)  # tl.full would need a layout in Gluon
    return tl.where(x > 0, one, tl.where(x < 0, 0 - one, x))


@triton.jit
def integer_pow(x, exponent: tl.constexpr):
    """``x ** exponent`` by repeated squaring."""
    magnitude: tl.constexpr = exponent if exponent >= 0 else -exponent
    result = ((x == x) | (x != x)).to(x.dtype)  # 1: tl.full would need a layout in Gluon
    square = x
    for bit in tl.static_range(0, 32):
        if (magnitude >> bit) & 1:
            result = result * square
        if (magnitude >> bit) > 1:
            square = square * square
    if exponent < 0:
        result = 1.0 / result
    return result


@triton.jit
def quotient(x, y):
    """x / y for 1e-37 < |y| < 8e37 or y = inf: in float32 a third of a division's instructions."""
    if y.dtype == tl.float32:
        return libdevice.fast_dividef(x, y)
    return x / y


@triton.jit
def exp(x):
    """exp(x); of a float32 0 below 2**-126, which takes two instructions instead of five."""
    if x.dtype == tl.float32:
        return tl.exp2(x * 1.4426950408889634)
    return tl.exp(x)


@triton.jit
def logistic(x):
    """The sigmoid 1 / (1 + exp(-x)); where exp(-x) exceeds 8e37, 0."""
    return quotient(1.0, 1.0 + exp(-x))


@triton.jit
def logistic_of(x, m):
    """The sigmoid of x, given m = exp(-|x|)."""
    r = quotient(1.0, 1.0 + m)
    return tl.where(x >= 0, r, m * r)


@triton.jit
def log1p_of_unit(x):
    """log(1 + x) for 0 <= x <= 1, to a few units in the last place.

    With s = x / (2 + x) it is 2 artanh(s) = s P(s²); P is a minimax fit of relative error 4e-9 on
    s <= 1/3.
    """
    if x.dtype == tl.float32:
        s = quotient(x, 2.0 + x)
        z = s * s
        p = 0.28178325295448303 * z + 0.27960604429244995
        p = p * z + 0.40024909377098083
        p = p * z + 0.6666631698608398
        return s * (p * z + 2.0)
    return libdevice.log1p(x)


@triton.jit
def erfc(x):
    """Complementary error function of a float32, to a few units in the last place where x < 3.

    erfc(|x|) = t Q(t) exp(-x²) with t = 1 / (1 + 0.3 |x|); Q is a minimax fit of relative error
    3e-8 on |x| <= 13, beyond which float32 has no number but 0. It has no branch, and a gelu's
    gradient shares the exponential.
    """
    magnitude = tl.abs(x)
    t = quotient(1.0, 1.0 + 0.3 * magnitude)
    q = -0.12787200510501862 * t + 0.47776100039482117
    q = q * t - 0.4966002106666565
    q = q * t + 0.5302636623382568
    q = q * t - 0.08289757370948792
    q = q * t + 0.2100369781255722
    q = q * t + 0.1495637148618698
    q = q * t + 0.17054668068885803
    q = q * t + 0.16919775307178497
    positive = t * q * exp(-(x * x))
    return tl.where(x < 0, 2.0 - positive, positive)


@triton.jit
def of_odds(m):
    """The probability m / (1 + m) of odds 0 <= m <= 8e37."""
    return quotient(m, 1.0 + m)


@triton.jit
def gaussian(x, scale: tl.constexpr):
    """exp(-(scale x)²)."""
    return tl.exp2(x * x * (-1.4426950408889634 * scale * scale))


@triton.jit
def scaled_erfc(x, scale: tl.constexpr, factor: tl.constexpr):
    """factor erfc(scale x), to a relative 3e-4: an eighth of what rounding to bfloat16 changes.

    As :func:`erfc`, with t = 1 / (1 + 0.716 |x|) and Q of the third degree.
    """
    slope: tl.constexpr = 0.716 * scale if scale > 0 else -0.716 * scale
    t = quotient(1.0, 1.0 + slope * tl.abs(x))
    q = -0.2527822746760128 * factor * t + 0.47584841782829357 * factor
    q = q * t + 0.3706885207541778 * factor
    q = q * t + 0.4059618573521088 * factor
    near = t * q * gaussian(x, scale)
    return tl.where(x < 0 if scale > 0 else x > 0, 2.0 * factor - near, near)


@triton.jit
def short_tanh(x):
    """tanh(x) to a relative 2e-6, enough for 16 bits: 1 - 2 / (1 + exp(2x)) but near 0."""
    near = x - x * (x * x * 0.3333333333333333)
    return tl.where(tl.abs(x) < 0.03, near, 1.0 - quotient(2.0, 1.0 + exp(x + x)))


@triton.jit
def nan_max(x, y):
    """Maximum that propagates NaN, for ``tl.reduce``."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def nan_min(x, y):
    """Minimum that propagates NaN, for ``tl.reduce``."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def online_exp(most, x):
    """What a sum relative to ``most`` is scaled by when ``x`` comes, and the share of ``x`` in it.

    ``exp(old - new), exp(x - new)`` of the old and the new maximum: one of them is 1, and one
    exponential gives the other. Where both are the same infinity, both are 1.
    """
    smaller = tl.where(x == most, 1.0, exp(-tl.abs(x - most)))
    return tl.where(x > most, smaller, 1.0), tl.where(x > most, 1.0, smaller)


@triton.jit
def online_exp2(most, x):
    """:func:`online_exp` with powers of 2."""
    smaller = tl.where(x == most, 1.0, tl.exp2(-tl.abs(x - most)))
    return tl.where(x > most, smaller, 1.0), tl.where(x > most, 1.0, smaller)


@triton.jit
def finite(x):
    """``x``, 0 where it is infinite or NaN."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def groups(x, size: tl.constexpr):
    """``[rows, columns]`` as ``[rows, columns / size, size]``."""
    return tl.reshape(x, (x.shape[0], x.shape[1] // size, size))


@triton.jit
def group_sums(x, size: tl.constexpr):
    """The sums of groups of ``size`` neighbouring columns."""
    return tl.sum(groups(x, size), axis=2)


@triton.jit
def grouped_exp(most, x, size: tl.constexpr):
    """The new maxima of groups of columns, what their sums are scaled by, and the shares of ``x``.

    Shares are ``exp(x - finite(new))``: a sum times ``exp(new - m)`` is relative to ``m``, also
    where ``new`` is infinite or NaN.
    """
    new = tl.maximum(
        most, tl.reduce(groups(x, size), 2, nan_max), propagate_nan=tl.PropagateNan.ALL
    )
    base = finite(new)
    unit = exp(groups(x, size) - base[:, :, None])
    return new, exp(most - base), tl.reshape(unit, (new.shape[0], x.shape[1]))


@triton.jit
def grouped_exp2(most, x, size: tl.constexpr):
    """:func:`grouped_exp` with powers of 2."""
    new = tl.maximum(
        most, tl.reduce(groups(x, size), 2, nan_max), propagate_nan=tl.PropagateNan.ALL
    )
    base = finite(new)
    unit = tl.exp2(groups(x, size) - base[:, :, None])
    return new, tl.exp2(most - base), tl.reshape(unit, (new.shape[0], x.shape[1]))


@triton.jit
def relative_exp(x, most):
    """``exp(x - most)``, 1 where both are the same infinity."""
    return tl.where(x == most, 1.0, exp(x - most))


@triton.jit
def relative_exp2(x, most):
    """:func:`relative_exp` with powers of 2."""
    return tl.where(x == most, 1.0, tl.exp2(x - most))


@triton.jit
def product(x, y):
    """Multiplication, for ``tl.reduce``."""
    return x * y


@triton.jit
def rotate_left(x, distance: tl.constexpr):
    return (x << distance) | (x >> (32 - distance))


@triton.jit
def _threefry_rounds(
    x0, x1, r0: tl.constexpr, r1: tl.constexpr, r2: tl.constexpr, r3: tl.constexpr
):
    x0 = x0 + x1
    x1 = x0 ^ rotate_left(x1, r0)
    x0 = x0 + x1
    x1 = x0 ^ rotate_left(x1, r1)
    x0 = x0 + x1
    x1 = x0 ^ rotate_left(x1, r2)
    x0 = x0 + x1
    x1 = x0 ^ rotate_left(x1, r3)
    return x0, x1


@triton.jit
def threefry2x32(k0, k1, x0, x1):
    """Threefry-2x32 with 20 rounds (Salmon et al., 2011), bit for bit as ``jax.random``."""
    k2 = k0 ^ k1 ^ 0x1BD11BDA
    x0 = x0 + k0
    x1 = x1 + k1
    x0, x1 = _threefry_rounds(x0, x1, 13, 15, 26, 6)
    x0 = x0 + k1
    x1 = x1 + k2 + 1
    x0, x1 = _threefry_rounds(x0, x1, 17, 29, 16, 24)
    x0 = x0 + k2
    x1 = x1 + k0 + 2
    x0, x1 = _threefry_rounds(x0, x1, 13, 15, 26, 6)
    x0 = x0 + k0
    x1 = x1 + k1 + 3
    x0, x1 = _threefry_rounds(x0, x1, 17, 29, 16, 24)
    x0 = x0 + k1
    x1 = x1 + k2 + 4
    x0, x1 = _threefry_rounds(x0, x1, 13, 15, 26, 6)
    x0 = x0 + k2
    x1 = x1 + k0 + 5
    return x0, x1


@triton.jit
def opaque(x, move: tl.constexpr):
    """An int32 constant, of which the compiler knows nothing.

    Branches that end in different ones stay branches: the compiler cannot merge them, nor run both.

    Args:
      x: the number.
      move: the instruction that gives it, ``"mov.b32 $0, 7;"`` for 7.
    """
    return tl.inline_asm_elementwise(move, "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)
