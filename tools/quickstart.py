#!/usr/bin/env python3
"""From a bare checkout to a trained classifier: one command, a few minutes, no GPU needed.

    python3 tools/quickstart.py

Makes ``.venv`` if it has to, trains ``test_ravlt`` on scikit-learn's handwritten digits, measures
it on held-out images and classifies one of them from a PNG file. Everything it writes goes to
``output/quickstart``, replacing what an earlier quickstart left there. Each step is an ordinary
``vitlinear`` command, printed before it runs. Further arguments go to ``vitlinear train``, for
instance ``--epochs 3``.
"""

import json
import os
import shlex

import _venv

EXTRAS = ["train"]
CONFIG = "configs/classification/digits_test_ravlt.yaml"
OUTPUT = "output/quickstart"
SAMPLE = 7  # which held-out image is classified at the end
EXPORT = (
    "import sys; from vitlinear.data.dataset import export_sample; "
    "print(export_sample('digits', int(sys.argv[1]), sys.argv[2]))"
)


def step(title: str, arguments: list[str]) -> None:
    """Runs one ``vitlinear`` command, showing it first so that it can be repeated by hand.

    Raises:
        _venv.SetupError: the command failed; its own message has been printed.
    """
    _venv.say(f"{title}: vitlinear {shlex.join(arguments)}")
    status = _venv.run([_venv.program("vitlinear"), *arguments])
    if status:
        raise _venv.SetupError(
            f"`vitlinear {arguments[0]}` ended with exit status {status}", status
        )


def main(arguments: list[str]) -> int:
    """Prepares the environment, trains, evaluates and predicts."""
    python = _venv.ensure(EXTRAS)
    # This model is too small to gain from a second thread, and where another program wants the
    # other core, two threads wait for each other and are many times slower than one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = _venv.ROOT / OUTPUT
    # The last weights, not the best: those were chosen by the held-out images, so their accuracy
    # on them flatters.
    checkpoint = f"{OUTPUT}/last.safetensors"
    train = ["train", "--config", CONFIG, "--output", OUTPUT, "--overwrite", *arguments]
    step("training", train)
    evaluation = f"{OUTPUT}/evaluation.json"
    validate = ["validate", "--checkpoint", checkpoint, "--workers", "0"]
    step("evaluating", [*validate, "--results-file", evaluation])
    image = f"{OUTPUT}/held_out_{SAMPLE}.png"
    truth = _venv.output([python, "-c", EXPORT, str(SAMPLE), image])
    prediction = f"{OUTPUT}/prediction.json"
    predict = ["predict", "--checkpoint", checkpoint, image, "--topk", "3"]
    step("predicting", [*predict, "--results-file", prediction])

    top1 = json.loads((folder / "evaluation.json").read_text())["top1"]
    guesses = json.loads((folder / "prediction.json").read_text())[0]["predictions"]
    likely = ", ".join(
        f"{guess['class']} ({100 * guess['probability']:.1f} %)" for guess in guesses
    )
    print()
    for name, value in (
        ("held-out top-1", f"{top1:.2f} %"),
        ("one held-out image", f"a {truth}; predicted {likely}"),
        ("checkpoint", checkpoint),
        ("metrics", f"{OUTPUT}/metrics.jsonl"),
        ("curves", f"{OUTPUT}/curves.png"),
    ):
        print(f"{name:<20}{value}")
    return 0


if __name__ == "__main__":
    _venv.script(main)
