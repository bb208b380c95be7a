"""How models are compiled."""

from __future__ import annotations

import pytest
import timm
import torch

from vitlinear.errors import UserError
from vitlinear.train.compilation import compile_arguments


def test_our_models_are_compiled_in_the_layout_they_have():
    model = timm.create_model("test_ravlt")
    for module in (model, model.stages[0].blocks[0]):
        arguments = compile_arguments(module, "inductor")
        assert arguments["options"] == {"layout_optimization": False}
        torch.compile(module, **arguments)  # raises where it knows no such option
    options = compile_arguments(model, "inductor", "max-autotune-no-cudagraphs")["options"]
    assert options["max_autotune"] and not options["layout_optimization"]
    for theirs in (
        compile_arguments(timm.create_model("test_vit"), "inductor", "default"),
        compile_arguments(model, "aot_eager"),
    ):
        assert "options" not in theirs


@pytest.mark.parametrize("name", ["test_ravlt", "test_resnet"])
@pytest.mark.parametrize(
    ("backend", "mode", "message"),
    [
        ("inductor", "fast", "--torchcompile-mode: .*max-autotune"),
        ("innductor", None, r"unknown --torchcompile innductor \(did you mean inductor\?\)"),
        ("aot_eager", "default", "no effect on --torchcompile aot_eager: leave it out"),
    ],
)
def test_what_torch_does_not_have_is_refused(name, backend, mode, message):
    with pytest.raises(UserError, match=message):
        compile_arguments(timm.create_model(name), backend, mode)
