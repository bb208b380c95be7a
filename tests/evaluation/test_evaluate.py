"""Loss, top-1 and top-5 against their definitions."""

import contextlib

import pytest
import torch
from torch import nn

from vitlinear.data.bad_images import UNREADABLE
from vitlinear.errors import UserError
from vitlinear.evaluation.evaluate import PerClass, evaluate


class Fixed(nn.Module):
    """Yields the logits it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.quick
@pytest.mark.parametrize("classes", [3, 8])
def test_evaluation_against_its_definition(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(23, classes, generator=generator)
    labels = torch.randint(0, classes, (23,), generator=generator)
    loader = list(zip(logits.split(5), labels.split(5), strict=True))
    counter = PerClass(classes)
    net = Fixed().train()
    metrics = evaluate(net, loader, contextlib.nullcontext, evaluator=counter)
    assert net.training
    order = logits.argsort(dim=1, descending=True)
    hits = order == labels[:, None]
    assert metrics["top1"] == pytest.approx(100 * hits[:, 0].double().mean().item())
    assert metrics["top5"] == pytest.approx(100 * hits[:, :5].any(1).double().mean().item())
    loss = nn.functional.cross_entropy(logits.double(), labels).item()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    for label in range(classes):
        assert counter.images[label] == (labels == label).sum()
        assert counter.correct[label] == hits[labels == label, 0].sum()
    if classes <= 5:
        assert metrics["top5"] == 100.0


def test_unreadable_images_of_one_process_are_no_error_where_another_read_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reduction that adds as many as the other process has: images, or none."""
    loader = [(torch.zeros(2, 3), torch.full((2,), UNREADABLE))]

    def measured(others: int) -> dict[str, float]:
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda mine: mine.add_(others))
        return evaluate(Fixed(), loader, contextlib.nullcontext, distributed=True)

    assert measured(1)["top1"] == 100
    with pytest.raises(UserError, match="none of 2 held-out images could be read"):
        measured(0)


def test_a_label_beyond_the_classes_is_an_error() -> None:
    loader = [(torch.zeros(2, 3), torch.tensor([0, 3]))]
    with pytest.raises(UserError, match="label 3, the model only 3 classes"):
        evaluate(Fixed(), loader, contextlib.nullcontext)
