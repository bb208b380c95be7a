"""The forward kernels: sums over keys into the state, and queries that read it.

Programs are numbered (sample and head, split of the tokens). With one split a single kernel does
everything, for several heads where maps are short; with more, each split leaves its sums in a slot
of its own, slots are merged in their order, and a second kernel reads the state. No sum depends on
which program ends first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    beside,
    by_half,
    computed_once,
    count_tokens,
    encode,
    end_of,
    larger,
    load_channels,
    load_positions,
    load_powers,
    load_scale,
    load_state,
    load_tokens,
    load_values,
    load_vector,
    load_weights,
    opposite_state,
    opposite_vector,
    read_product,
    seen_tokens,
    steps,
    store_channels,
    store_state,
    store_statistic,
    store_values,
    store_vector,
    sum_product,
    valid_tokens,
    value_lanes,
    vector_lanes,
    zero_block,
    zeros,
)
from .feature_maps import phi_k, phi_q, read_factors

# No compilation anew for another resolution or another stage.
RUN_TIME = ("length", "width", "heads", "chunk", "splits", "slots")


@triton.jit
def program(counts, length, width, heads, chunk, scale, plan: tl.constexpr):
    """The part of the tensors that this program works on.

    Returns:
        Slot (sample and head), head, split, and a place: sample, head, range of tokens, width of
        the grid, valid tokens in the sample, whether there is none, and D^-0.5. A span is the
        tuple of position tables, mask and place.
    """
    slot = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first = split * chunk
    last = tl.minimum(first + chunk, length)
    h, place = _place(slot, first, last, counts, length, width, heads, scale, plan)
    return slot, h, split, place


@triton.jit
def whole(slot, counts, length, width, heads, scale, plan: tl.constexpr):
    """All tokens of a slot: its head and the place, as in `program`."""
    # Of a window a constant, or its loop would remain; a constant takes more registers in a loop.
    first = 0 if plan.window else tl.program_id(1) * length
    return _place(slot, first, length, counts, length, width, heads, scale, plan)


@triton.jit
def _place(slot, first, last, counts, length, width, heads, scale, plan: tl.constexpr):
    b, h = slot // heads, slot % heads
    count = count_tokens(counts, b, length, plan)
    empty = count < 0.5
    count = larger(count, 1.0)
    return h, (b, h, first, last, width, count, empty, scale)


@triton.jit
def mean_query(q, span, plan: tl.constexpr):
    """Share of a span in the mean of phi(q) over the valid tokens, [features]."""
    _, mask, place, powers = span
    b, h, first, last, _, count, _, _ = place
    total = zeros(plan.block_features)
    for start in steps(first, end_of(first, last, plan), plan.block_tokens):
        n = start + tl.arange(0, plan.block_tokens)
        valid = valid_tokens(mask, b, n, n < last, plan)
        features = phi_q(load_tokens(q, b, h, n, valid, plan), powers, plan)
        total += tl.sum(tl.where(valid[:, None], features, 0.0), 0)
    return total / count


@triton.jit
def key_sums(k, v, given, query, span, plan: tl.constexpr):
    """State, normaliser, mean value and logsumexp of a span.

    With a softmax over keys, state and normaliser are averages under the softmax of this span, as
    in online softmax; without, the span's share of the means over all tokens.
    """
    tables, mask, place, powers = span
    b, h, first, last, width, count, empty, scale = place
    weight = 1.0 / count
    state = zero_block(plan.block_rows, plan.block_values)
    norm = zeros(plan.block_features)
    mean = zeros(plan.block_values)
    total = zeros(plan.block_features) if plan.key_weights == "token_softmax" else weight * 0.0
    top = total - float("inf")
    for start in steps(first, end_of(first, last, plan), plan.block_tokens):
        n = start + tl.arange(0, plan.block_tokens)
        inside = n < last
        valid = valid_tokens(mask, b, n, inside, plan)
        cos, sin = load_positions(tables, h, n, width, inside, plan)
        features = phi_k(load_tokens(k, b, h, n, valid, plan), powers, plan)
        values = load_values(v, b, h, n, valid, plan)
        seen = seen_tokens(valid, inside, empty, plan)
        if plan.key_weights == "uniform":
            features = tl.where(valid[:, None], features, 0.0) * weight
        elif plan.has_weights:
            features *= load_weights(given, b, h, n, valid, plan) * weight
            features = computed_once(features, valid)
        elif plan.key_weights == "global_query":
            logits = tl.sum(features * query[None, :], 1) * scale
            logits = tl.where(seen, logits, -float("inf"))
            new_top = tl.maximum(top, tl.max(logits, 0))
            # A span may begin with padding: there is no maximum yet.
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
            weights = tl.exp(logits - base)
            decay = tl.exp(top - base)
            features = features * weights[:, None]
            total = total * decay + tl.sum(weights, 0)
            state = state * decay
            norm = norm * decay
            top = new_top
        else:
            _, exists = vector_lanes(plan)
            logits = tl.where(seen[:, None], features, -float("inf"))
            new_top = tl.maximum(top, tl.max(logits, 0))
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
            features = tl.exp(logits - base[None, :])
            features = tl.where(exists[None, :], features, 0.0)
            decay = tl.exp(top - base)
            total = total * decay + tl.sum(features, 0)
            state = state * _of_rows(decay, plan)[:, None]
            top = new_top
        if plan.uses_norm:
            norm += tl.sum(features, 0)
        if plan.uses_mean:
            mean += tl.sum(values, 0) * weight
        encoded = encode(features, cos, sin, False, plan)
        state = sum_product(encoded, values, state, plan)
    if plan.has_softmax:
        present = tl.where(total == 0, 1.0, total)  # nothing seen: zeros, of weight exp(-inf)
        norm = norm / present
        top = tl.where(total == 0, top, top + tl.log(present))
        if plan.key_weights == "token_softmax":
            present = _of_rows(present, plan)[:, None]
        state = state / present
    return state, norm, mean, top


@triton.jit
def _of_rows(x, plan: tl.constexpr):
    """A vector of features, one entry for each row of the state."""
    if plan.positions == "cosine":
        width: tl.constexpr = plan.block_rows
        return tl.reshape(beside(x[None, :], x[None, :], plan), (width,))
    else:
        return x


@triton.jit
def opposite_norm(norm, plan: tl.constexpr):
    """m as the second read takes it; nothing where there is one read."""
    if plan.reads_opposite:
        return opposite_vector(norm, plan)
    else:
        return 0.0


@triton.jit
def outputs(features, encoded, state, norm, opposite, mean, scale, count, plan: tl.constexpr):
    """Outputs of a block of queries without the epilogue; the state has tau in it."""
    value = read_product(encoded, state, plan)
    if plan.uses_norm:
        z = tl.sum(features * norm[None, :], 1)
        of_state, of_mean = read_factors(z, scale, count, plan)
        if plan.reads_opposite:
            z_opposite = tl.sum(features * opposite[None, :], 1)
            second, _of_mean = read_factors(z_opposite, scale, count, plan)
            value *= by_half(of_state, second, plan)
        else:
            value *= of_state[:, None]
        if plan.uses_mean:
            value += of_mean[:, None] * mean[None, :]
    return value


@triton.jit
def read_state(q, out, epilogue, state, norm, mean, span, plan: tl.constexpr):
    """Outputs of a span; the state has tau in it, and is the one that two reads take."""
    lepe, gate = epilogue
    tables, mask, place, powers = span
    b, h, first, last, width, count, _, scale = place
    opposite = opposite_norm(norm, plan)
    for start in steps(first, end_of(first, last, plan), plan.block_tokens):
        n = start + tl.arange(0, plan.block_tokens)
        inside = n < last
        valid = valid_tokens(mask, b, n, inside, plan)
        cos, sin = load_positions(tables, h, n, width, inside, plan)
        x = load_tokens(q, b, h, n, valid, plan)
        # All loads of a block come first: one wait for memory, not one before and one after the
        # product.
        if plan.has_lepe:
            added = load_values(lepe, b, h, n, valid, plan)
        if plan.has_gate:
            factor = load_values(gate, b, h, n, valid, plan)
        features = computed_once(phi_q(x, powers, plan), valid)
        encoded = encode(features, cos, sin, False, plan)
        value = outputs(features, encoded, state, norm, opposite, mean, scale, count, plan)
        if plan.has_lepe:
            value += added
        if plan.has_gate:
            value *= factor
        store_values(out, value, b, h, n, inside, valid, plan)


@triton.jit
def store_sums(sums, slot, state, norm, mean, plan: tl.constexpr):
    """Leave state, m and vbar, or their gradients, in a slot: those that the mechanism has."""
    state_at, norm_at, mean_at = sums
    store_state(state_at, slot, state, plan)
    if plan.uses_norm:
        store_vector(norm_at, slot, norm, plan)
    if plan.uses_mean:
        store_channels(mean_at, slot, mean, plan)


@triton.jit
def load_sums(sums, slot, plan: tl.constexpr):
    """State, m and vbar, or their gradients; zeros where the mechanism has none."""
    state_at, norm_at, mean_at = sums
    norm = zeros(plan.block_features)
    mean = zeros(plan.block_values)
    if plan.uses_norm:
        norm = load_vector(norm_at, slot, plan)
    if plan.uses_mean:
        mean = load_channels(mean_at, slot, plan)
    return load_state(state_at, slot, plan), norm, mean


@triton.jit(do_not_specialize=RUN_TIME)
def forward_kernel(
    q, k, v, weights, out, epilogue, tables, mask, counts, powers, head_scale, sums, query_at,
    statistics, length, width, heads, slots, scale, plan: tl.constexpr,
):  # fmt: skip
    """Everything for one head of one sample, or for several in turn where a block holds one."""
    if plan.window:
        for slot in steps(tl.program_id(0).to(tl.int64), slots, tl.num_programs(0)):
            _forward(
                slot, q, k, v, weights, out, epilogue, tables, mask, counts, powers,
                head_scale, sums, query_at, statistics, length, width, heads, scale, plan,
            )  # fmt: skip
    else:
        _forward(
            tl.program_id(0).to(tl.int64), q, k, v, weights, out, epilogue, tables, mask, counts,
            powers, head_scale, sums, query_at, statistics, length, width, heads, scale, plan,
        )  # fmt: skip


@triton.jit
def _forward(
    slot, q, k, v, weights, out, epilogue, tables, mask, counts, powers, head_scale, sums, query_at,
    statistics, length, width, heads, scale, plan: tl.constexpr,
):  # fmt: skip
    h, place = whole(slot, counts, length, width, heads, scale, plan)
    span = (tables, mask, place, load_powers(powers, h, plan))
    query = zeros(plan.block_features)
    if plan.key_weights == "global_query":
        query = mean_query(q, span, plan)
        store_vector(query_at, slot, query, plan)
    state, norm, mean, statistic = key_sums(k, v, weights, query, span, plan)
    store_sums(sums, slot, state, norm, mean, plan)
    if plan.has_softmax:
        store_statistic(statistics, slot, statistic, plan)
    state = opposite_state(state * load_scale(head_scale, h, plan), plan)
    read_state(q, out, epilogue, state, norm, mean, span, plan)


@triton.jit(do_not_specialize=RUN_TIME)
def mean_query_kernel(
    q, mask, counts, powers, parts, length, heads, chunk, scale, plan: tl.constexpr
):  # fmt: skip
    """The share of a split in the mean query."""
    slot, h, split, place = program(counts, length, 1, heads, chunk, scale, plan)
    span = (None, mask, place, load_powers(powers, h, plan))
    store_vector(parts, split * tl.num_programs(0) + slot, mean_query(q, span, plan), plan)


@triton.jit(do_not_specialize=RUN_TIME)
def state_kernel(
    k, v, weights, tables, mask, counts, powers, query_at, sums, statistics,
    length, width, heads, chunk, scale, plan: tl.constexpr,
):  # fmt: skip
    """The sums over the keys of a split."""
    slot, h, split, place = program(counts, length, width, heads, chunk, scale, plan)
    span = (tables, mask, place, load_powers(powers, h, plan))
    slots = tl.num_programs(0)
    query = zeros(plan.block_features)
    if plan.key_weights == "global_query":
        query = load_vector(query_at, slot, plan)
    state, norm, mean, statistic = key_sums(k, v, weights, query, span, plan)
    slot = split * slots + slot
    store_sums(sums, slot, state, norm, mean, plan)
    if plan.has_softmax:
        store_statistic(statistics, slot, statistic, plan)


@triton.jit(do_not_specialize=RUN_TIME)
def read_kernel(
    q, out, epilogue, tables, mask, counts, powers, head_scale, sums,
    length, width, heads, chunk, scale, plan: tl.constexpr,
):  # fmt: skip
    """The outputs of a split."""
    slot, h, _, place = program(counts, length, width, heads, chunk, scale, plan)
    span = (tables, mask, place, load_powers(powers, h, plan))
    state, norm, mean = load_sums(sums, slot, plan)
    state = opposite_state(state * load_scale(head_scale, h, plan), plan)
    read_state(q, out, epilogue, state, norm, mean, span, plan)


@triton.jit
def _merged(parts, at, exists, slot, slots, splits, size: tl.constexpr):
    """Sum of the slots of all splits, entry by entry; eight loads at once wait for memory once."""
    total = tl.zeros(at.shape, tl.float32)
    for first in steps(0, splits, 8):
        split = first + tl.arange(0, 8)
        places = (split * slots + slot) * size
        there = (split < splits)[:, None] & exists[None, :]
        total += tl.sum(tl.load(parts + places[:, None] + at[None, :], mask=there, other=0.0), 0)
    return total


@triton.jit
def _merged_softmax(parts, at, exists, slot, slots, splits, size: tl.constexpr, softmax):
    """Sum of averages under a softmax, entry by entry: each slot has its share of it for weight."""
    statistics, row, logsumexp, statistic_size = softmax
    total = tl.zeros(at.shape, tl.float32)
    for first in steps(0, splits, 8):
        split = first + tl.arange(0, 8)
        places = (split * slots + slot)[:, None]
        there = (split < splits)[:, None] & exists[None, :]
        statistic_at = statistics + places * statistic_size + row[None, :]
        statistic = tl.load(statistic_at, mask=there, other=-float("inf"))
        part = tl.load(parts + places * size + at[None, :], mask=there, other=0.0)
        weights = tl.where(there, tl.exp(statistic - logsumexp[None, :]), 0.0)
        total += tl.sum(part * weights, 0)
    return total


@triton.jit
def _merged_logsumexp(statistics, at, exists, slot, slots, splits, size: tl.constexpr):
    """Logsumexp of the logsumexps of all splits, entry by entry."""
    top = tl.zeros(at.shape, tl.float32) - float("inf")
    for first in steps(0, splits, 8):
        some = _eight_statistics(statistics, at, exists, slot, slots, first, splits, size)
        top = larger(top, tl.max(some, 0))
    total = tl.zeros(at.shape, tl.float32)
    for first in steps(0, splits, 8):
        some = _eight_statistics(statistics, at, exists, slot, slots, first, splits, size)
        total += tl.sum(tl.exp(some - top[None, :]), 0)  # NaN, if there is any
    return top + tl.log(total)


@triton.jit
def _eight_statistics(statistics, at, exists, slot, slots, first, splits, size: tl.constexpr):
    """The logsumexps of eight splits, -inf of those beyond the last."""
    split = first + tl.arange(0, 8)
    inside = (split < splits)[:, None]
    places = (split * slots + slot)[:, None] * size
    some = tl.load(statistics + places + at[None, :], mask=inside & exists[None, :], other=0.0)
    return tl.where(inside, some, -float("inf"))


@triton.jit(do_not_specialize=RUN_TIME)
def sum_kernel(parts, total, splits, size: tl.constexpr, block: tl.constexpr):
    """The sum over all splits of a vector, for kernels that read it: once, not in each of them."""
    slot = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    exists = at < size
    merged = _merged(parts, at, exists, slot, tl.num_programs(0), splits, size)
    tl.store(total + slot * size + at, merged, mask=exists)


@triton.jit(do_not_specialize=RUN_TIME)
def merge_kernel(
    parts, statistic_parts, sums, statistics, splits,
    softmax: tl.constexpr, block: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    """Merge the slots of all splits: ``block`` entries of a state, the first program the rest."""
    slot = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    slots = tl.num_programs(0)
    state_parts, _, _ = parts
    state_at, _, _ = sums
    size: tl.constexpr = plan.rows * plan.values
    width: tl.constexpr = plan.statistics

    entry = tile * block + tl.arange(0, block)
    row = entry // plan.value_dim
    at = row * plan.values + entry % plan.value_dim
    exists = row < plan.rows
    if softmax:
        row = row // (plan.rows // plan.features) if width > 1 else row * 0
        lse = _merged_logsumexp(statistic_parts, row, exists, slot, slots, splits, width)
        how = (statistic_parts, row, lse, width)
        state = _merged_softmax(state_parts, at, exists, slot, slots, splits, size, how)
    else:
        state = _merged(state_parts, at, exists, slot, slots, splits, size)
    tl.store(state_at + slot * size + at, state, mask=exists)

    if tile == 0:
        _merge_vectors(parts, statistic_parts, sums, statistics, slot, slots, splits, softmax, plan)


@triton.jit
def _merge_vectors(
    parts, statistic_parts, sums, statistics, slot, slots, splits,
    softmax: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    """Merge everything but the state."""
    _, norm_parts, mean_parts = parts
    _, norm_at, mean_at = sums
    size: tl.constexpr = plan.features
    width: tl.constexpr = plan.statistics
    at, exists = vector_lanes(plan)
    if softmax:
        row = at if width > 1 else at * 0
        lse = _merged_logsumexp(statistic_parts, row, exists, slot, slots, splits, width)
        own = exists if width > 1 else at == 0
        tl.store(statistics + slot * width + row, lse, mask=own)
        if plan.uses_norm:
            how = (statistic_parts, row, lse, width)
            norm = _merged_softmax(norm_parts, at, exists, slot, slots, splits, size, how)
            store_vector(norm_at, slot, norm, plan)
    elif plan.uses_norm:
        norm = _merged(norm_parts, at, exists, slot, slots, splits, size)
        store_vector(norm_at, slot, norm, plan)
    if plan.uses_mean:
        channel, in_head = value_lanes(plan)
        mean = _merged(mean_parts, channel, in_head, slot, slots, splits, plan.values)
        store_channels(mean_at, slot, mean, plan)
