"""The small calls of the self-check launch every kernel of the mechanism on a GPU."""

import pytest

pytest.importorskip("triton")

import torch  # noqa: E402

from benchmarks.host_cost import without_launches  # noqa: E402
from vitlinear import ops  # noqa: E402
from vitlinear.ops import self_check  # noqa: E402
from vitlinear.ops.triton import INTERPRETING, calls  # noqa: E402
from vitlinear.tune.calls import of_mechanism  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter launches nothing")

# Forward and backward, of calls whose tokens are cut into splits.
SUMS, KEYS = ["state_kernel", "merge_kernel", "read_kernel"], ["query_kernel", "merge_kernel"]
SOFTMAX = ["key_mean_kernel", "sum_kernel", "key_kernel"]
SPLITS = {
    "lightnet": [*SUMS, *KEYS, *SOFTMAX],
    "rala": [
        "mean_query_kernel", "sum_kernel", *SUMS, *KEYS, *SOFTMAX, "sum_kernel", "query_kernel"
    ],
}  # fmt: skip


def launches(mechanism, dim):
    """Kernels that run at each grid, and whether the first of them takes windows."""
    call = of_mechanism(mechanism, (1, 1, 1, dim), torch.bfloat16, ("rotary", "lepe", "gate"))
    kind = call._replace(device="cpu", device_index=None, training=True).kind
    found = []
    with without_launches() as launched:
        for grid in self_check.GRIDS:
            launched.names.clear()
            calls._prepared.clear()
            self_check.run_kernels(kind, grid)
            first = next(iter(calls._prepared.values())).slices[0].forward
            found.append(([*launched.names], first._plan.window > 0))
    return found


@pytest.mark.parametrize("mechanism", ops.MECHANISMS)
def test_every_path_is_checked(mechanism):
    one_kernel = ["forward_kernel", "backward_kernel"]
    splits = SPLITS.get(mechanism, [*SUMS, *KEYS, "key_kernel"])
    found = launches(mechanism, 64)
    assert found == [(one_kernel, False), (one_kernel, False), (splits, False)]


def test_windows_are_checked():
    """Of heads that are narrow enough for them."""
    assert [windows for _, windows in launches("mala", 32)] == [True, False, False]
