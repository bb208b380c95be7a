"""The backward kernels: closed-form gradients, everything that depends on a token computed anew.

Notation and formulas are those of `vitlinear.ops.backward`. A pass over the queries leaves G, dm
and dvbar; a pass over the keys takes them. Where keys go through a softmax, another pass over the
keys stands between, for the mean that the gradient of a softmax subtracts; and where one query
weighs the keys, the gradients of the queries wait for that of their mean, in a last pass over the
queries.

The mean could be had from the states alone, as <dS, S> + dm . m. Summed from the terms that it is
subtracted from, it has their rounding, and cancels where one key has nearly all the weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    by_half,
    computed_once,
    encode,
    end_of,
    load_positions,
    load_powers,
    load_scale,
    load_statistic,
    load_tokens,
    load_values,
    load_vector,
    load_weights,
    opposite_state,
    opposite_vector,
    read_product,
    second_half,
    seen_tokens,
    smaller,
    steps,
    store_gradients,
    store_power_gradients,
    store_statistic,
    store_values,
    store_vector,
    store_weight_gradients,
    sum_product,
    valid_tokens,
    vector_lanes,
    zero_block,
    zeros,
)
from .feature_maps import phi_k, phi_k_vjp, phi_q, phi_q_vjp, read_factors, read_slopes
from .forward_kernels import (
    RUN_TIME,
    load_sums,
    opposite_norm,
    outputs,
    program,
    store_sums,
    whole,
)


@triton.jit
def epilogue_pass(
    q, grad_out, epilogue, grad_epilogue, state, norm, mean, span, plan: tl.constexpr
):  # fmt: skip
    """Gradients of lepe and gate of a span, for which outputs are computed anew.

    A loop of its own before `query_pass`: in one loop both take more registers than a program has.
    What that one reads again is in the cache by then. The state has tau in it, and is the one
    that two reads take.
    """
    lepe, gate = epilogue
    grad_lepe, grad_gate = grad_epilogue
    tables, mask, place, powers = span
    b, h, first, last, width, count, _, scale = place
    opposite = opposite_norm(norm, plan)
    for start in steps(first, end_of(first, last, plan), plan.block_tokens):
        n = start + tl.arange(0, plan.block_tokens)
        inside = n < last
        valid = valid_tokens(mask, b, n, inside, plan)
        cos, sin = load_positions(tables, h, n, width, inside, plan)
        x = load_tokens(q, b, h, n, valid, plan)
        g = load_values(grad_out, b, h, n, valid, plan)
        if plan.has_lepe:
            added = load_values(lepe, b, h, n, valid, plan)
            grad = g * load_values(gate, b, h, n, valid, plan)
            store_values(grad_lepe, grad, b, h, n, inside, valid, plan)
        features = computed_once(phi_q(x, powers, plan), valid)
        encoded = encode(features, cos, sin, False, plan)
        value = outputs(features, encoded, state, norm, opposite, mean, scale, count, plan)
        if plan.has_lepe:
            value += added
        store_values(grad_gate, g * value, b, h, n, inside, valid, plan)


@triton.jit
def query_pass(
    q, grad_out, grad_q, gate, state, norm, mean, grad_query, span,
    sums: tl.constexpr, grads: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    """G, dm and dvbar of a span (``sums``), and the gradients of its queries (``grads``).

    The state has tau in it, and is the one that two reads take; ``grad_query`` is what every valid
    query gets through their mean. With the gradients goes the span's share of those of powers.

    One loop keeps the state and its gradient at once; two, where those are too large, each keep
    one of them. What the second reads again is in the cache by then.
    """
    if sums and plan.query_loops == 2 and (grads or plan.uses_norm):
        _, grad_norm, grad_mean, grad_powers = _query_loop(
            q, grad_out, grad_q, gate, state, norm, mean, grad_query, span,
            False, grads, True, plan,
        )  # fmt: skip
        grad_state, _, _, _ = _query_loop(
            q, grad_out, grad_q, gate, state, norm, mean, grad_query, span,
            True, False, False, plan,
        )  # fmt: skip
    else:
        grad_state, grad_norm, grad_mean, grad_powers = _query_loop(
            q, grad_out, grad_q, gate, state, norm, mean, grad_query, span,
            sums, grads, sums, plan,
        )  # fmt: skip
    return opposite_state(grad_state, plan), grad_norm, grad_mean, grad_powers


@triton.jit
def _query_loop(
    q, grad_out, grad_q, gate, state, norm, mean, grad_query, span,
    of_state: tl.constexpr, of_queries: tl.constexpr, of_vectors: tl.constexpr,
    plan: tl.constexpr,
):  # fmt: skip
    """A loop of `query_pass`: G, gradients of queries, dm and dvbar, those that are asked for."""
    tables, mask, place, powers = span
    b, h, first, last, width, count, _, scale = place
    grad_state = zero_block(plan.block_rows, plan.block_values)
    grad_norm = zeros(plan.block_features)
    grad_mean = zeros(plan.block_values)
    grad_powers = zeros(plan.block_dim)
    opposite = opposite_norm(norm, plan)
    grad_opposite = zeros(plan.block_features)
    transposed = tl.trans(state)
    with_slopes: tl.constexpr = of_queries or (of_vectors and plan.uses_norm)
    for start in steps(first, end_of(first, last, plan), plan.block_tokens):
        n = start + tl.arange(0, plan.block_tokens)
        inside = n < last
        valid = valid_tokens(mask, b, n, inside, plan)
        cos, sin = load_positions(tables, h, n, width, inside, plan)
        x = load_tokens(q, b, h, n, valid, plan)
        g = load_values(grad_out, b, h, n, valid, plan)
        if plan.has_gate:
            g *= load_values(gate, b, h, n, valid, plan)
        if plan.block_values > 64:
            g = computed_once(g, valid)
        features = computed_once(phi_q(x, powers, plan), valid)
        weighted, of_values = features, g  # what the state sees of the gradient of the output
        if plan.uses_norm:
            z = tl.sum(features * norm[None, :], 1)
            factor, factor_of_mean = read_factors(z, scale, count, plan)
            slope, slope_of_mean = read_slopes(z, scale, count, plan)
        if plan.reads_opposite:
            z_opposite = tl.sum(features * opposite[None, :], 1)
            second_factor, _of_mean = read_factors(z_opposite, scale, count, plan)
            of_values = g * by_half(factor, second_factor, plan)
        if with_slopes:
            u = encode(read_product(of_values, transposed, plan), cos, sin, True, plan)
            grad = u
        if plan.reads_opposite:
            if with_slopes:
                second_slope, _of_mean = read_slopes(z_opposite, scale, count, plan)
                encoded = encode(features, cos, sin, False, plan)
                along = read_product(encoded, state, plan) * g
                second = second_half(plan)[None, :]
                grad_z = slope * tl.sum(tl.where(second, 0.0, along), 1)
                grad_z_opposite = second_slope * tl.sum(tl.where(second, along, 0.0), 1)
                grad += norm[None, :] * grad_z[:, None]
                grad += opposite[None, :] * grad_z_opposite[:, None]
                if of_vectors:
                    grad_norm += tl.sum(features * grad_z[:, None], 0)
                    grad_opposite += tl.sum(features * grad_z_opposite[:, None], 0)
        elif plan.uses_norm:
            weighted = features * factor[:, None]
            if with_slopes:
                grad_z = tl.zeros_like(z)
                if plan.read_out != "injective":  # whose factor of the state is a constant
                    grad_z = slope * tl.sum(features * u, 1)
                if plan.uses_mean:
                    grad_z += slope_of_mean * tl.sum(g * mean[None, :], 1)
                grad = u * factor[:, None] + norm[None, :] * grad_z[:, None]
                if of_vectors:
                    grad_norm += tl.sum(features * grad_z[:, None], 0)
                    if plan.uses_mean:
                        grad_mean += tl.sum(g * factor_of_mean[:, None], 0)
        if of_state:
            encoded = encode(weighted, cos, sin, False, plan)
            grad_state = sum_product(encoded, of_values, grad_state, plan)
        if of_queries:
            grad, of_powers = phi_q_vjp(x, grad + grad_query[None, :], powers, plan)
            store_gradients(grad_q, grad, b, h, n, inside, valid, plan)
            if plan.has_powers:
                grad_powers += tl.sum(of_powers, 0)
    if plan.reads_opposite:
        grad_norm += opposite_vector(grad_opposite, plan)
    return grad_state, grad_norm, grad_mean, grad_powers


@triton.jit
def key_terms(k, v, given, n, query, statistic, transposed, grad_norm, span, plan: tl.constexpr):
    """The terms of a block of keys that both passes over the keys take.

    Returns:
        Features, weights c and y; valid tokens, their positions, keys.
    """
    tables, mask, place, powers = span
    b, h, _, last, width, count, empty, scale = place
    inside = n < last
    valid = valid_tokens(mask, b, n, inside, plan)
    cos, sin = load_positions(tables, h, n, width, inside, plan)
    x = load_tokens(k, b, h, n, valid, plan)
    values = load_values(v, b, h, n, valid, plan)
    features = computed_once(phi_k(x, powers, plan), valid)
    y = encode(read_product(values, transposed, plan), cos, sin, True, plan)
    y += grad_norm[None, :]
    # Never above one, though the logits of huge keys may round otherwise than in the forward pass.
    seen = seen_tokens(valid, inside, empty, plan)
    if plan.key_weights == "global_query":
        logits = tl.sum(features * query[None, :], 1) * scale
        weights = tl.where(seen, tl.exp(smaller(logits - statistic, 0.0)), 0.0)[:, None]
    elif plan.key_weights == "token_softmax":
        _, exists = vector_lanes(plan)
        weights = tl.exp(smaller(features - statistic[None, :], 0.0))
        weights = tl.where(seen[:, None] & exists[None, :], weights, 0.0)
    elif plan.has_weights:
        weights = computed_once(load_weights(given, b, h, n, valid, plan), valid) / count
    else:
        weights = tl.where(valid, 1.0 / count, 0.0)[:, None]
    return features, weights, y, valid, cos, sin, x


@triton.jit
def key_mean(k, v, query, statistic, grad_state, grad_norm, span, plan: tl.constexpr):
    """A span's share of what the gradient of a softmax subtracts.

    That is sum_j c_j phi(k_j) . y_j, or the same of each feature.
    """
    _, _, place, powers = span
    _, _, first, last, _, count, _, _ = place
    total = count * 0.0 if plan.key_weights == "global_query" else zeros(plan.block_features)
    transposed = tl.trans(grad_state)
    for start in steps(first, end_of(first, last, plan), plan.block_tokens):
        n = start + tl.arange(0, plan.block_tokens)
        features, weights, y, _valid, _cos, _sin, _x = key_terms(
            k, v, None, n, query, statistic, transposed, grad_norm, span, plan
        )
        if plan.key_weights == "global_query":
            along = tl.sum(features * y, 1)[:, None]
            # Not a sum over the one column, at which Triton's compiler for Blackwell fails.
            tokens: tl.constexpr = plan.block_tokens
            total += tl.sum(tl.reshape(weights * along, (tokens,)), 0)
        else:
            total += tl.sum(weights * y, 0)
    return total


@triton.jit
def key_pass(
    k, v, weighing, grad_k, grad_v, query, statistic, grad_state, grad_norm, grad_mean, subtracted,
    span, plan: tl.constexpr,
):  # fmt: skip
    """Gradients of a span's keys, values, and weights of keys that were given.

    Returns:
        Its share of the gradients of the mean query and of powers.
    """
    _, _, place, powers = span
    b, h, first, last, _, count, _, scale = place
    grad_query = zeros(plan.block_features)
    grad_powers = zeros(plan.block_dim)
    transposed = tl.trans(grad_state)
    given = None
    if plan.has_weights:
        given, grad_given = weighing
    for start in steps(first, end_of(first, last, plan), plan.block_tokens):
        n = start + tl.arange(0, plan.block_tokens)
        features, weights, y, valid, cos, sin, x = key_terms(
            k, v, given, n, query, statistic, transposed, grad_norm, span, plan
        )
        if plan.key_weights == "global_query":
            along = tl.sum(features * y, 1)[:, None]
            grad_logits = weights * (along - subtracted) * scale
            grad_query += tl.sum(grad_logits * features, 0)
            grad = y * weights + grad_logits * query[None, :]
            weighted = features * weights
        elif plan.key_weights == "token_softmax":
            grad = weights * (y - subtracted[None, :])
            weighted = weights
        else:
            if plan.has_weights:
                of_weights = features * y / count
                store_weight_gradients(grad_given, of_weights, b, h, n, n < last, valid, plan)
            grad = y * weights
            weighted = features * weights
        grad, of_powers = phi_k_vjp(x, grad, powers, plan)
        store_gradients(grad_k, grad, b, h, n, n < last, valid, plan)
        if plan.has_powers:
            grad_powers += tl.sum(of_powers, 0)
        encoded = encode(weighted, cos, sin, False, plan)
        grad = read_product(encoded, grad_state, plan)
        if plan.uses_mean:
            grad += grad_mean[None, :] / count
        store_values(grad_v, grad, b, h, n, n < last, valid, plan)
    return grad_query, grad_powers


@triton.jit
def load_softmax(query_at, statistics, slot, plan: tl.constexpr):
    """The mean query and the logsumexp of a softmax over keys, where there are any."""
    query = zeros(plan.block_features)
    statistic = 0.0
    if plan.key_weights == "global_query":
        query = load_vector(query_at, slot, plan)
    if plan.has_softmax:
        statistic = load_statistic(statistics, slot, plan)
    return query, statistic


@triton.jit(do_not_specialize=RUN_TIME)
def backward_kernel(
    grad_out, q, k, v, weighing, grad_q, grad_k, grad_v, epilogue, grad_epilogue, tables, mask,
    counts, powers, head_scale, grad_scale, grad_powers, sums, query_at, statistics,
    length, width, heads, slots, scale, plan: tl.constexpr,
):  # fmt: skip
    """Everything for one head of one sample, or for several in turn where a block holds one."""
    if plan.window:
        for slot in steps(tl.program_id(0).to(tl.int64), slots, tl.num_programs(0)):
            _backward(
                slot, grad_out, q, k, v, weighing, grad_q, grad_k, grad_v, epilogue,
                grad_epilogue, tables, mask, counts, powers, head_scale, grad_scale, grad_powers,
                sums, query_at, statistics, length, width, heads, scale, plan,
            )  # fmt: skip
    else:
        _backward(
            tl.program_id(0).to(tl.int64), grad_out, q, k, v, weighing, grad_q, grad_k, grad_v,
            epilogue, grad_epilogue, tables, mask, counts, powers, head_scale, grad_scale,
            grad_powers, sums, query_at, statistics, length, width, heads, scale, plan,
        )  # fmt: skip


@triton.jit
def _backward(
    slot, grad_out, q, k, v, weighing, grad_q, grad_k, grad_v, epilogue, grad_epilogue, tables,
    mask, counts, powers, head_scale, grad_scale, grad_powers, sums, query_at, statistics,
    length, width, heads, scale, plan: tl.constexpr,
):  # fmt: skip
    h, place = whole(slot, counts, length, width, heads, scale, plan)
    _, _, _, _, _, count, _, _ = place
    span = (tables, mask, place, load_powers(powers, h, plan))
    state, norm, mean = load_sums(sums, slot, plan)
    query, statistic = load_softmax(query_at, statistics, slot, plan)
    tau = load_scale(head_scale, h, plan)
    grad_query = zeros(plan.block_features)
    read = opposite_state(state * tau, plan)
    _, gate = epilogue
    if plan.has_gate:
        epilogue_pass(q, grad_out, epilogue, grad_epilogue, read, norm, mean, span, plan)
    grad_state, grad_norm, grad_mean, of_queries = query_pass(
        q, grad_out, grad_q, gate, read, norm, mean, grad_query, span,
        True, plan.key_weights != "global_query", plan,
    )  # fmt: skip
    if plan.has_scale:
        tl.store(grad_scale + slot, tl.sum(tl.sum(grad_state * state, 1), 0))
    grad_state = grad_state * tau
    subtracted = 0.0
    if plan.has_softmax:
        subtracted = key_mean(k, v, query, statistic, grad_state, grad_norm, span, plan)
    grad_query, of_keys = key_pass(
        k, v, weighing, grad_k, grad_v, query, statistic, grad_state, grad_norm, grad_mean,
        subtracted, span, plan,
    )  # fmt: skip
    if plan.key_weights == "global_query":
        _, _, _, of_queries = query_pass(
            q, grad_out, grad_q, gate, read, norm, mean, grad_query / count, span,
            False, True, plan,
        )  # fmt: skip
    store_power_gradients(grad_powers, slot, of_queries + of_keys, plan)


@triton.jit(do_not_specialize=RUN_TIME)
def query_kernel(
    grad_out, q, grad_q, epilogue, grad_epilogue, tables, mask, counts, powers, head_scale, sums,
    grad_query_at, grad_sums, power_parts, length, width, heads, chunk, scale,
    with_sums: tl.constexpr, with_grads: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    """The pass over the queries of a split: sums into a slot of its own, gradients, or both."""
    slot, h, split, place = program(counts, length, width, heads, chunk, scale, plan)
    _, _, _, _, _, count, _, _ = place
    span = (tables, mask, place, load_powers(powers, h, plan))
    slots = tl.num_programs(0)
    state, norm, mean = load_sums(sums, slot, plan)
    grad_query = zeros(plan.block_features)
    if not with_sums:
        grad_query = load_vector(grad_query_at, slot, plan) / count
    state = opposite_state(state * load_scale(head_scale, h, plan), plan)
    _, gate = epilogue
    if with_sums and plan.has_gate:
        epilogue_pass(q, grad_out, epilogue, grad_epilogue, state, norm, mean, span, plan)
    grad_state, grad_norm, grad_mean, grad_powers = query_pass(
        q, grad_out, grad_q, gate, state, norm, mean, grad_query, span, with_sums, with_grads, plan
    )  # fmt: skip
    if with_sums:
        store_sums(grad_sums, split * slots + slot, grad_state, grad_norm, grad_mean, plan)
    if with_grads:
        store_power_gradients(power_parts, split * slots + slot, grad_powers, plan)


@triton.jit(do_not_specialize=RUN_TIME)
def key_mean_kernel(
    k, v, tables, mask, counts, powers, head_scale, query_at, statistics, grad_sums, mean_parts,
    length, width, heads, chunk, scale, plan: tl.constexpr,
):  # fmt: skip
    """The share of a split in what the gradient of a softmax over keys subtracts."""
    slot, h, split, place = program(counts, length, width, heads, chunk, scale, plan)
    span = (tables, mask, place, load_powers(powers, h, plan))
    query, statistic = load_softmax(query_at, statistics, slot, plan)
    grad_state, grad_norm, _ = load_sums(grad_sums, slot, plan)
    grad_state = grad_state * load_scale(head_scale, h, plan)
    mean = key_mean(k, v, query, statistic, grad_state, grad_norm, span, plan)
    store_statistic(mean_parts, split * tl.num_programs(0) + slot, mean, plan)


@triton.jit(do_not_specialize=RUN_TIME)
def key_kernel(
    k, v, weighing, grad_k, grad_v, tables, mask, counts, powers, head_scale, query_at, statistics,
    grad_sums, mean_at, grad_query_parts, power_parts, length, width, heads, chunk, scale,
    plan: tl.constexpr,
):  # fmt: skip
    """The pass over the keys of a split."""
    slot, h, split, place = program(counts, length, width, heads, chunk, scale, plan)
    span = (tables, mask, place, load_powers(powers, h, plan))
    slots = tl.num_programs(0)
    query, statistic = load_softmax(query_at, statistics, slot, plan)
    grad_state, grad_norm, grad_mean = load_sums(grad_sums, slot, plan)
    grad_state = grad_state * load_scale(head_scale, h, plan)
    subtracted = 0.0
    if plan.has_softmax:
        subtracted = load_statistic(mean_at, slot, plan)
    grad_query, grad_powers = key_pass(
        k, v, weighing, grad_k, grad_v, query, statistic, grad_state, grad_norm, grad_mean,
        subtracted, span, plan,
    )  # fmt: skip
    store_power_gradients(power_parts, split * slots + slot, grad_powers, plan)
    if plan.key_weights == "global_query":
        store_vector(grad_query_parts, split * slots + slot, grad_query, plan)
