"""Parts that kernels are made of: tokens in and out, positions, products.

A kernel works on blocks of ``block_tokens`` tokens of one head of one sample. Channels of queries
and keys fill a block of ``block_dim``, a power of two of at least 16; features and state rows fill
one, two or four such blocks side by side. What lies like values (the output, its gradient, the
terms of the epilogue) fills a block of ``block_values``. Lanes beyond the head's own channels hold
zeros, among features too. Everything that depends on the mechanism, the head or the machine stands
in one compile-time `Plan` (see `plan`).

Formulas are those of `vitlinear.ops.rotary` and `backward`; `feature_maps` has more parts.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton import knobs

INTERPRETING: bool = knobs.runtime.interpret

if INTERPRETING:

    def _whole(x: Any) -> int:
        return int(x.handle.data.item()) if isinstance(x, tl.tensor) else int(x)

    def steps(first: Any, last: Any, step: Any) -> range:
        """`range`, which the interpreter's own fails at where NumPy is 2.4 or newer."""
        return range(_whole(first), _whole(last), _whole(step))

else:
    steps = tl.range


# Shapes are made of the constants that these take: Triton does not see numbers inside a tuple.


@triton.jit
def zeros(width: tl.constexpr):
    """A vector of zeros."""
    return tl.zeros((width,), tl.float32)


@triton.jit
def zero_block(height: tl.constexpr, width: tl.constexpr):
    """A matrix of zeros."""
    return tl.zeros((height, width), tl.float32)


# NaN goes through everything here as through the formula: a run that diverges must show it, and a
# loss scaler must see it. The maximum and minimum of a GPU take the other operand instead, and
# whatever compares with NaN is false.


@triton.jit
def larger(a, b):
    """The larger of two, NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    """The smaller of two, NaN if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def channel_lanes(width: tl.constexpr, plan: tl.constexpr):
    """Index of the channel in each of ``width`` lanes, and whether it exists."""
    channel = tl.arange(0, width) % plan.block_dim
    return channel, channel < plan.head_dim


@triton.jit
def value_lanes(plan: tl.constexpr):
    """Index of the channel in each lane of values, and whether it exists."""
    channel = tl.arange(0, plan.block_values)
    return channel, channel < plan.value_dim


@triton.jit
def vector_lanes(plan: tl.constexpr):
    """Offsets of features in a stored vector, and whether they exist."""
    channel, exists = channel_lanes(plan.block_features, plan)
    part = tl.arange(0, plan.block_features) // plan.block_dim
    return part * plan.head_dim + channel, exists


@triton.jit
def state_lanes(plan: tl.constexpr):
    """Offsets of the entries of a stored state, and whether they exist.

    It has as many rows as there are features and as many columns as values, of a matrix [F, D]. The
    cosine and the sine of a channel lie in neighbouring rows, as in `rotary.encode`.
    """
    channel, exists = channel_lanes(plan.block_rows, plan)
    part = tl.arange(0, plan.block_rows) // plan.block_dim
    row = channel * 2 + part if plan.positions == "cosine" else part * plan.head_dim + channel
    column, in_head = value_lanes(plan)
    return row[:, None] * plan.values + column[None, :], exists[:, None] & in_head[None, :]


@triton.jit
def load_vector(start, slot, plan: tl.constexpr):
    """A vector of features from its slot."""
    at, exists = vector_lanes(plan)
    return tl.load(start + slot * plan.features + at, mask=exists, other=0.0)


@triton.jit
def store_vector(start, slot, x, plan: tl.constexpr):
    """Store a vector of features in its slot."""
    at, exists = vector_lanes(plan)
    tl.store(start + slot * plan.features + at, x, mask=exists)


@triton.jit
def load_channels(start, slot, plan: tl.constexpr):
    """A vector of channels of values from its slot."""
    channel, exists = value_lanes(plan)
    return tl.load(start + slot * plan.values + channel, mask=exists, other=0.0)


@triton.jit
def store_channels(start, slot, x, plan: tl.constexpr):
    """Store a vector of channels of values in its slot."""
    channel, exists = value_lanes(plan)
    tl.store(start + slot * plan.values + channel, x, mask=exists)


@triton.jit
def load_state(start, slot, plan: tl.constexpr):
    """A state from its slot."""
    at, exists = state_lanes(plan)
    return tl.load(start + slot * plan.rows * plan.values + at, mask=exists, other=0.0)


@triton.jit
def store_state(start, slot, x, plan: tl.constexpr):
    """Store a state in its slot."""
    at, exists = state_lanes(plan)
    tl.store(start + slot * plan.rows * plan.values + at, x, mask=exists)


@triton.jit
def load_statistic(start, slot, plan: tl.constexpr):
    """The logsumexp of a softmax over keys: one number for a head, or one for each feature."""
    if plan.key_weights == "global_query":
        return tl.load(start + slot)
    else:
        return load_vector(start, slot, plan)


@triton.jit
def store_statistic(start, slot, x, plan: tl.constexpr):
    """Store what `load_statistic` loads."""
    if plan.key_weights == "global_query":
        tl.store(start + slot, x)
    else:
        store_vector(start, slot, x, plan)


@triton.jit
def load_scale(head_scale, h, plan: tl.constexpr):
    """tau of a head."""
    if plan.has_scale:
        return tl.load(head_scale + h).to(tl.float32)
    else:
        return 1.0


@triton.jit
def _token_pointers(x, b, h, n, inside, channel, exists):
    """Addresses of tokens of a strided [B, N, h, D] tensor, and which of them exist.

    Offsets are 64 bits wide: tensors beyond 2^31 elements, and strides of channel-first maps.
    """
    start, batch_stride, token_stride, head_stride, channel_stride = x
    tokens = n.to(tl.int64) * token_stride
    channels = channel.to(tl.int64) * channel_stride
    head = start + b * batch_stride + h * head_stride
    return head + tokens[:, None] + channels[None, :], inside[:, None] & exists[None, :]


@triton.jit
def load_tokens(x, b, h, n, inside, plan: tl.constexpr):
    """Queries or keys in float32, zeros for padding, whatever it holds, NaN included."""
    channel, in_head = channel_lanes(plan.block_dim, plan)
    at, exists = _token_pointers(x, b, h, n, inside, channel, in_head)
    return tl.load(at, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def load_values(x, b, h, n, inside, plan: tl.constexpr):
    """Values in float32, zeros for padding, whatever it holds, NaN included."""
    channel, in_head = value_lanes(plan)
    at, exists = _token_pointers(x, b, h, n, inside, channel, in_head)
    return tl.load(at, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _weight_lanes(plan: tl.constexpr):
    """Index of the number in each lane of a key's weights, and whether it exists."""
    if plan.key_weights == "gates":
        return vector_lanes(plan)
    else:
        number = tl.arange(0, 1)
        return number, number < 1


@triton.jit
def load_weights(x, b, h, n, valid, plan: tl.constexpr):
    """Weights of keys that were given, in float32: [tokens, 1 or features], zeros for padding."""
    number, exists = _weight_lanes(plan)
    at, exists = _token_pointers(x, b, h, n, valid, number, exists)
    return tl.load(at, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def store_weight_gradients(x, value, b, h, n, inside, valid, plan: tl.constexpr):
    """Store gradients of given weights, of those of each feature, or add them to what is there."""
    number, exists = _weight_lanes(plan)
    at, exists = _token_pointers(x, b, h, n, inside, number, exists)
    if plan.key_weights == "given":
        value = tl.sum(value, 1)[:, None]
    if plan.adds:
        value += tl.load(at, mask=exists, other=0.0).to(tl.float32)
    _store(at, exists, value, valid, plan)


@triton.jit
def store_gradients(x, value, b, h, n, inside, valid, plan: tl.constexpr):
    """Store gradients of queries or keys, or add them to what is there."""
    channel, in_head = channel_lanes(plan.block_dim, plan)
    at, exists = _token_pointers(x, b, h, n, inside, channel, in_head)
    if plan.adds:
        value += tl.load(at, mask=exists, other=0.0).to(tl.float32)
    _store(at, exists, value, valid, plan)


@triton.jit
def store_values(x, value, b, h, n, inside, valid, plan: tl.constexpr):
    """Store what lies like values."""
    channel, in_head = value_lanes(plan)
    at, exists = _token_pointers(x, b, h, n, inside, channel, in_head)
    _store(at, exists, value, valid, plan)


@triton.jit
def _store(at, exists, value, valid, plan: tl.constexpr):
    """Store tokens in the type of the tensor, zeros for padding; float16 saturates."""
    if plan.has_mask:
        value = tl.where(valid[:, None], value, 0.0)
    if at.dtype.element_ty == tl.float16:
        value = smaller(larger(value, -65504.0), 65504.0)
    tl.store(at, value.to(at.dtype.element_ty), mask=exists)


@triton.jit
def end_of(first, last, plan: tl.constexpr):
    """Where a loop over the tokens of a span ends, of which ``last`` is the first outside.

    That of a window, which lies in one block, is a constant. No loop over tokens remains then, and
    the loop over windows is the one that loads ahead.
    """
    if plan.window:
        return first + plan.window
    else:
        return last


@triton.jit
def valid_tokens(mask, b, n, inside, plan: tl.constexpr):
    """Tokens that exist and are no padding."""
    if plan.has_mask:
        start, batch_stride, token_stride = mask
        at = start + b * batch_stride + n.to(tl.int64) * token_stride
        return inside & (tl.load(at, mask=inside, other=1) == 0)
    else:
        return inside


@triton.jit
def count_tokens(counts, b, length, plan: tl.constexpr):
    """Number of valid tokens; 0 for a sample of padding alone."""
    if plan.has_mask:
        return tl.load(counts + b)
    else:
        return length.to(tl.float32)


@triton.jit
def seen_tokens(valid, inside, empty, plan: tl.constexpr):
    """Tokens that a softmax over keys sees: the valid ones, or all where there is none."""
    if plan.has_mask:
        return tl.where(empty, inside, valid)
    else:
        return valid


@triton.jit
def load_powers(powers, h, plan: tl.constexpr):
    """Powers of a head's channels, 1 in lanes beyond them; 0 where feature maps take none."""
    if plan.has_powers:
        channel, in_head = channel_lanes(plan.block_dim, plan)
        at = powers + h * plan.head_dim + channel
        return tl.load(at, mask=in_head, other=1.0).to(tl.float32)
    else:
        return 0.0


@triton.jit
def store_power_gradients(parts, slot, x, plan: tl.constexpr):
    """Store the gradient of a head's powers in its slot, where there are any."""
    if plan.has_powers:
        channel, in_head = channel_lanes(plan.block_dim, plan)
        tl.store(parts + slot * plan.head_dim + channel, x, mask=in_head)


@triton.jit
def load_positions(tables, h, n, width, inside, plan: tl.constexpr):
    """Cosines and sines of the tokens' angles, one for each pair or each channel."""
    if plan.positions == "none":
        return 0.0, 0.0
    else:
        rows, cols, entries = tables
        # An axis table has the cosine and the sine of an angle side by side, all angles of a
        # position in a row: read together, they need a quarter of the load instructions.
        lane = tl.arange(0, plan.block_table)
        if plan.full_width:  # of heads side by side, each has its own part of a row
            of_axis = entries
            entry = h * plan.head_dim + lane
            own = lane < plan.head_dim
        else:
            of_axis = plan.table_entries
            entry = lane
            own = lane < 2 * plan.table_entries
        # One load from either table: two, each with half of its lanes masked, take twice the
        # traffic and twice the shared memory. Offsets are chosen, from one of the tables to the
        # other, because AMD's compiler chooses between no pointers. Both begin at a multiple of 16
        # bytes, which the compiler cannot see in a difference.
        size: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth // 8
        apart = (cols.to(tl.int64) - rows.to(tl.int64)) // size
        apart = tl.multiple_of(apart, 16 // size)
        row_at = (n // width)[:, None] * of_axis + entry[None, :]
        col_at = (n % width)[:, None] * of_axis + (entry - of_axis)[None, :]
        at = rows + tl.where((entry < of_axis)[None, :], row_at, apart + col_at)
        table = tl.load(at, mask=inside[:, None] & own[None, :], other=0.0).to(tl.float32)
        pairs: tl.constexpr = plan.block_table // 2
        return tl.split(tl.reshape(table, (table.shape[0], pairs, 2)))


@triton.jit
def beside(a, b, plan: tl.constexpr):
    """Two blocks of features beside each other, [a; b]."""
    width: tl.constexpr = 2 * plan.block_dim
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], width))


@triton.jit
def halves(x, plan: tl.constexpr):
    """The inverse of `beside`."""
    width: tl.constexpr = plan.block_dim
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, width)), (0, 2, 1)))


@triton.jit
def second_half(plan: tl.constexpr):
    """Which lanes of values belong to the second half of the channels."""
    channel, _ = value_lanes(plan)
    return channel + plan.first_value >= plan.values // 2


@triton.jit
def _exchanged_rows(state, plan: tl.constexpr):
    """A state with the halves of its rows exchanged."""
    half: tl.constexpr = plan.block_rows // 2
    width: tl.constexpr = plan.block_values
    a, b = tl.split(tl.permute(tl.reshape(state, (2, half, width)), (1, 2, 0)))
    return tl.reshape(tl.permute(tl.join(b, a), (2, 0, 1)), (plan.block_rows, width))


@triton.jit
def opposite_state(state, plan: tl.constexpr):
    """See `eager.opposite_state`; the state itself where there is one read."""
    if plan.reads_opposite:
        return tl.where(second_half(plan)[None, :], _exchanged_rows(state, plan), state)
    else:
        return state


@triton.jit
def opposite_vector(x, plan: tl.constexpr):
    """A vector of features with its halves exchanged."""
    a, b = tl.split(tl.permute(tl.reshape(x, (2, plan.block_dim)), (1, 0)))
    width: tl.constexpr = plan.block_features
    return tl.reshape(tl.permute(tl.join(b, a), (1, 0)), (width,))


@triton.jit
def by_half(first, second, plan: tl.constexpr):
    """Factors of tokens, one for each half of the values: [tokens, block_values]."""
    return tl.where(second_half(plan)[None, :], second[:, None], first[:, None])


@triton.jit
def encode(features, cos, sin, inverse: tl.constexpr, plan: tl.constexpr):
    """Apply R of the formula, or its transpose: rotate neighbouring channels, or [x cos; x sin]."""
    if plan.positions == "rotary":
        # Each block of channels turns alike.
        parts: tl.constexpr = plan.expansion
        pairs: tl.constexpr = plan.block_dim // 2
        width: tl.constexpr = plan.block_features
        x0, x1 = tl.split(tl.reshape(features, (features.shape[0], parts, pairs, 2)))
        cos = cos[:, None, :]
        sin = -sin[:, None, :] if inverse else sin[:, None, :]
        turned = tl.join(x0 * cos - x1 * sin, x1 * cos + x0 * sin)
        return tl.reshape(turned, (features.shape[0], width))
    elif plan.positions == "cosine":
        if inverse:
            of_cos, of_sin = halves(features, plan)
            return of_cos * cos + of_sin * sin
        else:
            return beside(features * cos, features * sin, plan)
    else:
        return features


@triton.jit
def computed_once(x, valid):
    """x, an operand of a product, zeros for padding.

    What comes from memory entry by entry, Triton's compiler computes anew in each warp that
    multiplies with it, in the layout of the operand: eight times the work, in more registers than
    there are. It does not look behind a mask that is made of indices.
    """
    return tl.where(valid[:, None], x, 0.0)


@triton.jit
def _nearest_tf32(x):
    """float32 rounded to the 10 bits of mantissa of TF32; ties go away from zero.

    A tensor core cuts the other 13 bits off, which would make every operand smaller.
    """
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    # Half a unit more makes zero of a NaN whose bits are all set, as those of GPUs are.
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def _product(a, b, total, precision: tl.constexpr):
    """a @ b + total with operands of the precision that a plan names, rounded to nearest."""
    if precision == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    elif precision == "tf32":
        return tl.dot(_nearest_tf32(a), _nearest_tf32(b), total, input_precision="tf32")
    else:
        return tl.dot(a, b, total, input_precision=precision)


@triton.jit
def sum_product(a, b, total, plan: tl.constexpr):
    """The product a^T b + total, for sums over tokens; float32 but for the operands."""
    precision: tl.constexpr = plan.sums
    return _product(tl.trans(a), b, total, precision)


@triton.jit
def read_product(a, state, plan: tl.constexpr):
    """The product a @ state, for reads of a state; float32 but for the operands."""
    precision: tl.constexpr = plan.reads
    return _product(a, state, tl.zeros((a.shape[0], state.shape[1]), tl.float32), precision)
