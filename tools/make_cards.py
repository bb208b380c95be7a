"""Make the model cards: model_cards/<family>.md from the registry and vitlinear/facts/facts.yaml.

What is slow to find out is kept in vitlinear/facts/counts.json: multiply-adds, and how closely the
outputs of the authors' code are met. An entry is made again when the model's parameters or input
size have changed, or on --recount, which any change of a forward pass asks for.

    python tools/make_cards.py            # count what is new, write counts.json and the cards
    python tools/make_cards.py --check    # write nothing; exit 1 if something is out of date
"""

import argparse
import fnmatch
import json
import os
import sys
from pathlib import Path
from typing import Any

# Before torch is imported: sums in one order, whatever the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import timm  # noqa: E402
import torch  # noqa: E402

from tests import golden  # noqa: E402
from vitlinear import facts  # noqa: E402
from vitlinear import models as registry  # noqa: E402
from vitlinear.cards import count, render  # noqa: E402
from vitlinear.checkpoints import checkpoint_filter_fn  # noqa: E402

COUNTS = ROOT / "vitlinear" / "facts" / facts.COUNTS
CARDS = ROOT / "model_cards"


def golden_weights(released: str) -> dict[str, torch.Tensor]:
    """Weights that those outputs were made with, under the authors' keys."""
    for path in sorted(golden.FOLDER.glob("*.json")):
        if released in (variants := json.loads(path.read_text())):
            entries = variants[released]["state_dict"]
            return golden.upstream_state_dict(entries, golden.family_of(released))
    raise KeyError(released)


def golden_sizes(name: str) -> list[tuple[int, int]]:
    """Input sizes at which there are outputs of the authors' model that this one is."""
    released = facts.family_of(name).model(name).released
    return golden.logit_sizes(released) if released else []


def agreement(name: str) -> dict[str, float]:
    """Relative difference of a model's logits from the authors', in float64, by input size."""
    released = facts.family_of(name).model(name).released
    sizes = golden_sizes(name)
    if not sizes:
        return {}
    assert released is not None
    torch.set_num_threads(1)
    model = timm.create_model(name).double().eval()
    model.load_state_dict(checkpoint_filter_fn(golden_weights(released), model))
    result = {}
    with torch.no_grad():
        for height, width in sizes:
            logits = model(golden.images(height, width))[:, :64]
            expected = golden.logits(released, height, width)
            result[f"{height}x{width}"] = golden.relative_error(logits, expected)
    return result


def is_current(name: str, entry: dict[str, Any]) -> bool:
    """Whether an entry was made of the model as it is, judged by what is quick to see."""
    return (
        entry["input_size"] == list(registry.input_size(name))
        and entry["params"] == registry.num_parameters(registry.on_meta(name))
        and entry.get("agreement", {}).keys() == {f"{h}x{w}" for h, w in golden_sizes(name)}
    )


def make_entry(name: str) -> dict[str, Any]:
    """Counts a model and compares it with its golden outputs."""
    size = registry.input_size(name)
    model = timm.create_model(name)
    cost = count.count(model, size)
    entry = {
        "input_size": list(size),
        "params": registry.num_parameters(model),
        "total": cost.total,
        "projections": cost.projections,
        "attention": cost.attention,
        "norms": cost.norms,
    }
    differences = agreement(name)
    return {**entry, "agreement": differences} if differences else entry


def write_counts(entries: dict[str, dict[str, Any]]) -> None:
    """Writes counts.json, one model a line."""
    lines = [f'  "{name}": {json.dumps(entry)}' for name, entry in entries.items()]
    COUNTS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    facts.counts.cache_clear()


def update_counts(recount: list[str] | None, check: bool) -> list[str]:
    """Brings counts.json up to date.

    Args:
        recount: Patterns of names to count again whatever the entry says; None for no model.
        check: Write nothing.

    Returns:
        Models whose entries were made, or would be.
    """
    old = json.loads(COUNTS.read_text(encoding="utf-8")) if COUNTS.exists() else {}
    new, changed = {}, []
    for name in registry.our_models():
        again = any(fnmatch.fnmatch(name, pattern) for pattern in recount or ())
        if not again and name in old and is_current(name, old[name]):
            new[name] = old[name]
            continue
        changed.append(name)
        if not check:
            print(f"counting {name}", flush=True)
            new[name] = make_entry(name)
    removed = sorted(old.keys() - new.keys() - set(changed))
    if not check and new != old:
        write_counts(new)
    return changed + removed


def main(argv: list[str] | None = None) -> int:
    """Runs the tool; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument(
        "--recount",
        nargs="*",
        metavar="PATTERN",
        help="count models again, those whose names fit a pattern or all",
    )
    args = parser.parse_args(argv)
    if args.check and args.recount is not None:
        parser.error("--check writes nothing, so it cannot --recount")
    recount = ["*"] if args.recount == [] else args.recount
    stale = update_counts(recount, args.check)
    if args.check and stale:
        print(f"{COUNTS.relative_to(ROOT)} is out of date: {', '.join(stale)}")
        return 1
    CARDS.mkdir(exist_ok=True)
    wrong = []
    for name, family in facts.families().items():
        if not render.family_models(family):
            print(f"{name}: none of its models is registered, no card", file=sys.stderr)
            continue
        path, card = CARDS / f"{name}.md", render.render(family)
        if not path.exists() or path.read_text(encoding="utf-8") != card:
            wrong.append(str(path.relative_to(ROOT)))
            if not args.check:
                path.write_text(card, encoding="utf-8")
    if wrong:
        print(f"{'out of date' if args.check else 'wrote'}: {', '.join(wrong)}")
    return 1 if args.check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
