"""Models that several threads call, as servers do: at several sizes, with gradients and without."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import timm
import torch

from tests.pairwise import pairwise
from vitlinear.models import our_models

MODELS = [name for name in our_models() if name.startswith("test_")]
SIZES = ((32, 32), (64, 48), (33, 47))
ROUNDS = 2


@pairwise(every=4, name=MODELS, fused=[False, True])
def test_threads_share_a_model(name, fused):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    if fused:
        model.fuse()
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(1, 3, *size, generator=generator) for size in SIZES]

    def logits(image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (model(image),)

    def logits_and_gradient(image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        image = image.clone().requires_grad_()
        out = model(image)
        return out.detach(), *torch.autograd.grad(out.square().sum(), image)

    calls = [(call, image) for call in (logits, logits_and_gradient) for image in images]
    expected = [call(image) for call, image in calls]
    with ThreadPoolExecutor(len(calls)) as threads:
        for _ in range(ROUNDS):
            # Weights that change have their layouts made anew, in the threads.
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(parameter.clone())
            found = list(threads.map(lambda pair: pair[0](pair[1]), calls))
            for actual, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
