"""Tensors that backward computes again: the same gradients, from less memory."""

import weakref

import pytest
import timm
import torch
from timm.layers import LayerNorm
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from benchmarks.saved import saved_bytes
from vitlinear.layers import ConvMlp, ResidualDepthwiseConv, recompute
from vitlinear.layers.recompute import run_recomputing


@pytest.fixture
def keeping_all(monkeypatch):
    """A switch: from its call on nothing is computed again."""
    return lambda: monkeypatch.setattr(recompute, "can_recompute", lambda x: False)


def gradients(model, x, amp=False):
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = model(x)
    return torch.autograd.grad(out.float().square().sum(), list(model.parameters()))


@pytest.mark.parametrize("name", ["test_ravlt", "test_mavit", "test_mila", "test_nalaformer"])
def test_gradients_are_bit_for_bit_the_same(name, keeping_all):
    model = timm.create_model(name, drop_path_rate=0.2, proj_drop_rate=0.1).train()
    x = torch.randn(2, 3, 64, 96)

    def each_way():
        found = []
        for amp, checkpointing in ((False, False), (True, False), (False, True)):
            model.set_grad_checkpointing(checkpointing)
            found += gradients(model, x, amp)
        return found

    less = each_way()
    keeping_all()
    assert all(torch.equal(a, b) for a, b in zip(less, each_way(), strict=True))


def test_memory(keeping_all):
    """Of the feed-forward network one hidden map stays of three, of norms what they took."""
    model, x = timm.create_model("test_ravlt").train(), torch.randn(2, 3, 64, 64)
    block, hidden = "stages.0.blocks.0.", 2 * 16 * 16 * 72 * 4
    less = saved_bytes(model, x)
    keeping_all()
    more = saved_bytes(model, x)
    assert less[f"{block}mlp.act"] == more[f"{block}mlp.act"] == hidden
    kernel = 72 * 9 * 4  # with the 1 in its middle
    assert more[f"{block}mlp.dwconv"] - kernel == more[f"{block}mlp.fc2"] == hidden
    assert less[f"{block}mlp.dwconv"] == kernel
    for name in ("mlp.fc1", "mlp.fc2", "attn.qkvo"):
        assert less[block + name] == 0 < more[block + name]


def test_nothing_else_holds_what_is_computed_again():
    """Autograd's hooks live until backward; what they refer to would too."""
    mlp, x, made = ConvMlp(4, 8), torch.randn(1, 3, 3, 4), []
    conv = mlp.dwconv.forward
    mlp.dwconv.forward = lambda y: made.append(weakref.ref(y)) or conv(y)
    out = mlp(x)
    assert [y() for y in made] == [None]
    out.sum().backward()
    assert len(made) == 2  # once more, for fc2


def test_what_backward_makes_twice_is_made_once():
    """GELU comes again for fc2, on the way to its input, and is there for the convolution."""
    mlp, x, calls = ConvMlp(4, 8), torch.randn(1, 3, 3, 4), []
    mlp.act.forward = lambda y, gelu=mlp.act.forward: calls.append(1) or gelu(y)
    out = mlp(x)
    assert len(calls) == 1
    for _ in range(2):  # of a graph that is kept, every time
        calls.clear()
        out.sum().backward(retain_graph=True)
        assert len(calls) == 1
    calls.clear()
    torch.autograd.grad(out.sum(), mlp.dwconv.parameters())
    assert len(calls) == 1


def test_derivatives_of_any_order():
    torch.manual_seed(0)
    mlp = ConvMlp(2, 3).double()
    norm = LayerNorm(2).double()
    x = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x):
        return run_recomputing((norm, mlp), x)

    assert torch.autograd.gradcheck(run, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, x)
    loss = run(x).square().sum()
    twice = [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*twice)
    assert torch.equal(torch.func.grad(lambda x: run(x).square().sum())(x), twice[0])


def doubled() -> nn.Module:
    """A GELU with a hook that changes what it puts out."""
    gelu = nn.GELU()
    gelu.register_forward_hook(lambda module, args, out: out * 2)
    return gelu


def perturbed() -> nn.Module:
    """A norm whose weight is another one whenever it is asked for."""

    class Noise(nn.Module):
        def forward(self, weight):
            return weight + torch.randn_like(weight)

    norm = nn.LayerNorm(4)
    register_parametrization(norm, "weight", Noise())
    return norm


class RandomGelu(nn.GELU):
    """A GELU, and noise."""

    def forward(self, x):
        return super().forward(x) * torch.rand_like(x)


class Observing(nn.Conv2d):
    """A depthwise convolution as quantisation has them, which counts what goes through it."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


@pytest.mark.parametrize(
    "first",
    [doubled(), nn.SiLU(inplace=True), nn.Dropout(0.5), RandomGelu(), perturbed()],
    ids=["hook", "in place", "random", "random subclass", "parametrization"],
)
def test_what_must_not_run_again(first):
    last, x = ResidualDepthwiseConv(4, 3), torch.randn(2, 5, 5, 4)

    def gradients_of(chain):
        torch.manual_seed(2)
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(chain(leaf * 1).square().sum(), (leaf, last.weight))

    less = gradients_of(lambda x: run_recomputing((first, last), x))
    more = gradients_of(lambda x: last(first(x)))
    assert all(torch.equal(a, b) for a, b in zip(less, more, strict=True))


def test_subclasses_do_not_run_again():
    first, x = Observing(4, 4, 1, groups=4), torch.randn(2, 4, 5, 5)
    run_recomputing((first, nn.Conv2d(4, 4, 1)), x).sum().backward()
    assert first.calls == 1


@pytest.mark.parametrize("name", ["test_ravlt", "test_nalaformer"])
def test_weights_lent_for_a_call(name):
    """Backward of `functional_call`, whose weights are the module's no more by then."""
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=5).double().eval(), torch.randn(2, 3, 64, 64)
    lent = {
        key: (value.detach() + 0.1 * torch.randn_like(value)).requires_grad_()
        for key, value in model.named_parameters()
    }
    out = torch.func.functional_call(model, lent, (x.double(),))
    results = torch.autograd.grad(out.square().sum(), list(lent.values()))
    model.load_state_dict(lent, strict=False)
    expected = torch.autograd.grad(model(x.double()).square().sum(), list(model.parameters()))
    torch.testing.assert_close(results, expected, rtol=1e-12, atol=1e-12)


def test_inside_other_hooks():
    """Those of gradient checkpointing, of offloading: what stays passes through them."""
    mlp, x = ConvMlp(4, 8), torch.randn(1, 3, 3, 4, requires_grad=True)
    expected = gradients(mlp, x)
    with torch.autograd.graph.save_on_cpu():
        assert all(map(torch.equal, gradients(mlp, x), expected))
    out = checkpoint(mlp, x, use_reentrant=False)
    grads = torch.autograd.grad(out.square().sum(), list(mlp.parameters()))
    assert all(map(torch.equal, grads, expected))


def test_compilers_see_the_plain_program():
    mlp, x = ConvMlp(4, 8), torch.randn(1, 3, 3, 4)
    exported = torch.export.export(mlp, (x,)).module()
    for program in (torch.jit.script(mlp), torch.jit.trace(mlp, x), exported):
        torch.testing.assert_close(program(x), mlp(x))


def kept_by_compiled(model, x) -> list[torch.Size]:
    """Shapes of what a compiled forward pass leaves for backward, its inputs and output aside."""
    kept = []

    def forward(program, inputs):
        (outputs,) = program.graph.find_nodes(op="output")[0].args
        kept.extend(node.meta["val"].shape for node in outputs[1:] if node.op != "placeholder")
        return program

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda program, inputs: program,
        partition_fn=min_cut_rematerialization_partition,  # inductor's
    )
    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(x).sum().backward()
    return kept


@pytest.mark.compile
def test_compiled_programs_keep_no_more():
    mlp, x = ConvMlp(4, 8), torch.randn(1, 3, 3, 4, requires_grad=True)
    hidden = 3 * 3 * 8
    kept = [shape.numel() for shape in kept_by_compiled(mlp, x)]
    assert kept.count(hidden) == 1
    mlp.act.register_forward_hook(lambda module, args, out: out * 2)
    kept = [shape.numel() for shape in kept_by_compiled(mlp, x)]
    assert kept.count(hidden) > 1  # what has hooks does not run again


@pytest.mark.compile
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_gradients(checkpointing):
    """In one program for all sizes, and where all is computed again anyway."""

    def forward(x):
        return checkpoint(mlp, x, use_reentrant=False) if checkpointing else mlp(x)

    mlp = ConvMlp(4, 8)
    parameters = list(mlp.parameters())
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (5, 6):
            x = torch.randn(2, size, size + 1, 4)
            less = torch.autograd.grad(compiled(x).square().sum(), parameters)
            more = torch.autograd.grad(mlp(x).square().sum(), parameters)
            torch.testing.assert_close(less, more)
