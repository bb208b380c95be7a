"""The flags that only ``train`` has, under timm's names, in the groups of ``--help``.

Defaults are the recipe that the published families share (AdamW, cosine, five epochs of warm-up,
learning rate 5e-4 per 512 images); augmentation is off until asked for, as in timm.
"""

from argparse import BooleanOptionalAction

from vitlinear.cli.flags import COUNT, NATURAL, POSITIVE, RATE
from vitlinear.cli.parser import KeyValues, Parser


def add_training_arguments(parser: Parser) -> None:
    """Adds all of them."""
    _add_weights(parser)
    _add_processes(parser)
    _add_optimiser(parser)
    _add_schedule(parser)
    _add_augmentation(parser)
    _add_average(parser)
    _add_distillation(parser)
    _add_run(parser)


def _add_weights(parser: Parser) -> None:
    """What training starts from, and the model's own regularisation."""
    group = parser.add_argument_group("weights")
    group.add_argument("--initial-checkpoint", default=None, metavar="FILE", help="start weights")
    group.add_argument(
        "--initial-model",
        default=None,
        metavar="NAME",
        help="the model they are of, if another; with it a run must have start weights",
    )
    group.add_argument(
        "--initial-head-map",
        default=None,
        metavar="FILE",
        help="for each class, in a line, the class in the start weights whose classifier it takes",
    )
    group.add_argument(
        "--head-init-scale",
        type=RATE,
        default=None,
        metavar="X",
        help="factor on the weights of the classifier",
    )
    group.add_argument(
        "--head-init-bias", type=float, default=None, metavar="B", help="bias of the classifier"
    )
    group.add_argument(
        "--freeze",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="parts that are not trained: names of modules or parameters, or globs of them",
    )
    group.add_argument("--drop", type=RATE, default=None, metavar="P", help="classifier dropout")
    group.add_argument("--drop-path", type=RATE, default=None, metavar="P", help="stochastic depth")
    group.add_argument(
        "--grad-checkpointing",
        action=BooleanOptionalAction,
        default=False,
        help="compute activations twice, for less memory",
    )
    group.add_argument(
        "--torchcompile",
        nargs="?",
        const="inductor",
        default=None,
        metavar="BACKEND",
        help="compile the model",
    )
    group.add_argument("--torchcompile-mode", default=None, metavar="MODE", help="of torch.compile")


def _add_processes(parser: Parser) -> None:
    """How it is spread over GPUs and machines."""
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--sync-bn",
        action=BooleanOptionalAction,
        default=False,
        help="BatchNorm over the images of all GPUs",
    )
    group.add_argument(
        "--dist-bn",
        default="reduce",
        choices=("", "broadcast", "reduce"),
        help="BatchNorm statistics after an epoch: '' leaves each process its own",
    )
    group.add_argument(
        "--fsdp", action=BooleanOptionalAction, default=False, help="split the model over them"
    )
    group.add_argument(
        "--dist-timeout", type=COUNT, default=600, metavar="S", help="longest wait for another"
    )


def _add_optimiser(parser: Parser) -> None:
    """What an update does."""
    group = parser.add_argument_group("optimiser")
    group.add_argument("--opt", default="adamw", metavar="NAME", help="any timm optimiser")
    group.add_argument(
        "--opt-eps", type=RATE, default=None, metavar="E", help="epsilon (default: the optimiser's)"
    )
    group.add_argument(
        "--opt-betas",
        type=RATE,
        nargs="+",
        default=None,
        metavar="B",
        help="(default: the optimiser's)",
    )
    group.add_argument(
        "--opt-kwargs",
        nargs="*",
        action=KeyValues,
        default={},
        metavar="K=V",
        help="more arguments of the optimiser",
    )
    group.add_argument("--momentum", type=RATE, default=0.9, help="of optimisers that have one")
    group.add_argument(
        "--weight-decay", type=RATE, default=0.05, help="not of biases and parameters of one axis"
    )
    group.add_argument(
        "--weight-decay-1d",
        nargs="*",
        default=[],
        metavar="PATTERN",
        help="decay these parameters although they have one axis: '*.gamma'",
    )
    group.add_argument(
        "--layer-decay",
        type=RATE,
        default=None,
        help="factor on the rate from each layer to the one before",
    )
    group.add_argument(
        "--clip-grad", type=RATE, default=None, metavar="X", help="bound of the gradients; 0: none"
    )
    group.add_argument(
        "--clip-mode",
        default="norm",
        choices=("norm", "value", "agc"),
        help="what is bounded: the whole norm, each value, or each norm against its weights'",
    )
    group.add_argument(
        "--grad-accum-steps", type=COUNT, default=1, metavar="N", help="batches behind an update"
    )


def _add_schedule(parser: Parser) -> None:
    """How long, and at which learning rates."""
    group = parser.add_argument_group("schedule")
    group.add_argument("--epochs", type=COUNT, default=300, help="length of the schedule")
    group.add_argument(
        "--stop-epoch", type=COUNT, default=None, metavar="N", help="end early, same schedule"
    )
    group.add_argument("-b", "--batch-size", type=COUNT, default=128, help="per process and step")
    group.add_argument("--lr", type=RATE, default=None, help="absolute; overrides --lr-base")
    group.add_argument("--lr-base", type=RATE, default=5e-4, help="for --lr-base-size images")
    group.add_argument(
        "--lr-base-size", type=COUNT, default=512, help="images per update that --lr-base is for"
    )
    group.add_argument(
        "--lr-base-scale",
        default="linear",
        choices=("linear", "sqrt"),
        help="how it follows their number",
    )
    group.add_argument(
        "--lr-base-all",
        action=BooleanOptionalAction,
        default=False,
        help="scale --warmup-lr and --min-lr from --lr-base-size too",
    )
    group.add_argument(
        "--recipe-batch-size",
        type=COUNT,
        default=None,
        metavar="N",
        help="images per update the rates were chosen for; a run with another number says so",
    )
    group.add_argument("--sched", default="cosine", metavar="NAME", help="any timm schedule")
    group.add_argument(
        "--sched-on-updates",
        action=BooleanOptionalAction,
        default=False,
        help="new rate at each update, not each epoch",
    )
    group.add_argument(
        "--warmup-epochs", type=RATE, default=5, metavar="N", help="from --warmup-lr up"
    )
    group.add_argument("--warmup-lr", type=RATE, default=1e-6, help="first rate")
    group.add_argument(
        "--warmup-prefix",
        action=BooleanOptionalAction,
        default=False,
        help="the schedule starts after the warm-up, not below it",
    )
    group.add_argument(
        "--cooldown-epochs", type=NATURAL, default=0, help="after --epochs, at --min-lr"
    )
    group.add_argument("--min-lr", type=RATE, default=1e-5, help="last rate")
    group.add_argument(
        "--decay-epochs", type=RATE, default=90, help="between steps, with --sched step"
    )
    group.add_argument(
        "--decay-milestones",
        type=COUNT,
        nargs="+",
        default=[90, 180, 270],
        help="with --sched multistep",
    )
    group.add_argument("--decay-rate", type=RATE, default=0.1, help="of --sched step and multistep")


def _add_augmentation(parser: Parser) -> None:
    """What happens to training images."""
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--train-split", default="train", metavar="NAME", help="name of the training data"
    )
    group.add_argument("--no-aug", action="store_true", default=False, help="resize and crop only")
    group.add_argument(
        "--aug", dest="no_aug", action="store_false", default=False, help="takes --no-aug back"
    )
    group.add_argument(
        "--train-crop-mode",
        default=None,
        choices=("rrc", "rkrc", "rkrr"),
        help="random resized crop, or timm's ratio-keeping ones",
    )
    group.add_argument(
        "--scale",
        type=RATE,
        nargs=2,
        default=[0.08, 1.0],
        metavar=("LO", "HI"),
        help="area of a random crop",
    )
    group.add_argument(
        "--ratio",
        type=RATE,
        nargs=2,
        default=[0.75, 4 / 3],
        metavar=("LO", "HI"),
        help="its width by its height",
    )
    group.add_argument("--hflip", type=RATE, default=0.5, help="probability of a horizontal flip")
    group.add_argument("--vflip", type=RATE, default=0.0, help="of a vertical one")
    group.add_argument("--color-jitter", type=RATE, default=0.4, help="without --aa")
    group.add_argument("--aa", default=None, metavar="POLICY", help="e.g. rand-m9-mstd0.5-inc1")
    group.add_argument("--aug-repeats", type=RATE, default=0, metavar="N", help="repeated aug.")
    group.add_argument(
        "--train-interpolation",
        default="random",
        metavar="NAME",
        help="random: bilinear or bicubic",
    )
    group.add_argument("--reprob", type=RATE, default=0.0, help="random erasing probability")
    group.add_argument(
        "--remode",
        default="pixel",
        choices=("const", "rand", "pixel"),
        help="what fills the erased part",
    )
    group.add_argument("--recount", type=COUNT, default=1, help="erased parts in an image")
    group.add_argument(
        "--mixup", type=RATE, default=0.0, metavar="ALPHA", help="alpha of mixup; 0: off"
    )
    group.add_argument(
        "--cutmix", type=RATE, default=0.0, metavar="ALPHA", help="likewise of CutMix"
    )
    group.add_argument("--mixup-prob", type=RATE, default=1.0, help="of mixing a batch")
    group.add_argument(
        "--mixup-switch-prob", type=RATE, default=0.5, help="of CutMix where both are on"
    )
    group.add_argument(
        "--mixup-mode",
        default="batch",
        choices=("batch", "pair", "elem"),
        help="a draw for each batch, pair or image",
    )
    group.add_argument("--mixup-off-epoch", type=NATURAL, default=0, help="0: never off")
    group.add_argument("--smoothing", type=RATE, default=0.1, help="of labels")


def _add_average(parser: Parser) -> None:
    """The moving average of the weights."""
    group = parser.add_argument_group("average of the weights")
    group.add_argument(
        "--model-ema",
        action=BooleanOptionalAction,
        default=False,
        help="average the weights, and evaluate the average",
    )
    group.add_argument("--model-ema-decay", type=RATE, default=0.9998, help="for one update")
    group.add_argument(
        "--model-ema-base-size",
        type=COUNT,
        default=None,
        metavar="N",
        help="images that --model-ema-decay is for; default: those of an update",
    )
    group.add_argument(
        "--model-ema-warmup",
        action=BooleanOptionalAction,
        default=False,
        help="let the decay rise to its value",
    )


def _add_distillation(parser: Parser) -> None:
    """Teachers."""
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--kd-model-name", default=None, metavar="NAME", help="teacher, with its published weights"
    )
    group.add_argument(
        "--kd-checkpoint", default=None, metavar="FILE", help="weights of the teacher instead"
    )
    group.add_argument(
        "--kd-distill-type",
        default="logit",
        choices=("logit", "feature", "token"),
        help="what of the teacher is learnt",
    )
    group.add_argument(
        "--kd-loss-type", default="kl", choices=("kl", "hard"), help="with logit: soft or hard"
    )
    group.add_argument(
        "--kd-token-distill-type",
        default="soft",
        choices=("soft", "hard"),
        help="with token: soft or hard",
    )
    group.add_argument(
        "--kd-temperature", type=POSITIVE, default=4.0, metavar="T", help="of soft labels"
    )
    group.add_argument(
        "--distill-loss-weight", type=RATE, default=None, metavar="W", help="of the teacher's term"
    )
    group.add_argument(
        "--task-loss-weight",
        type=RATE,
        default=None,
        metavar="W",
        help="of the labels' term; alone, the teacher's is 1 - W",
    )
    group.add_argument(
        "--mesa", type=RATE, default=0.0, metavar="W", help="learn from the average of the weights"
    )
    group.add_argument(
        "--mesa-start-epoch", type=NATURAL, default=5, metavar="N", help="epochs without it"
    )
    group.add_argument(
        "--mesa-temperature",
        type=POSITIVE,
        default=1.0,
        metavar="T",
        help="likewise of soft labels",
    )


def _add_run(parser: Parser) -> None:
    """The run folder, and how a run goes."""
    group = parser.add_argument_group("run")
    group.add_argument("-c", "--config", default=None, metavar="FILE", help="YAML of flag values")
    group.add_argument(
        "--print-config",
        action="store_true",
        help="print every flag as --config and command line leave it, as YAML, and end",
    )
    group.add_argument(
        "--output",
        default=None,
        metavar="DIR",
        help="run folder (default: output/train/TIME-MODEL)",
    )
    group.add_argument("--experiment", default=None, metavar="NAME", help="sub-folder of --output")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier run there")
    group.add_argument(
        "--resume",
        default=None,
        metavar="PATH",
        help="a run folder or its last_state.pt; auto: --output, if there is a run",
    )
    group.add_argument(
        "--recovery-interval",
        type=NATURAL,
        default=0,
        metavar="N",
        help="save the state every N updates, not only after an epoch; 0: only then",
    )
    group.add_argument(
        "--max-nonfinite",
        type=NATURAL,
        default=10,
        metavar="N",
        help="updates of an epoch that may be skipped because loss or gradients are not finite",
    )
    group.add_argument(
        "--validation-batch-size", type=COUNT, default=None, help="(default: --batch-size)"
    )
    group.add_argument(
        "--eval-metric",
        default="top1",
        choices=("top1", "top5", "loss"),
        help="that decides which epoch is the best",
    )
    group.add_argument(
        "--log-interval", type=COUNT, default=50, metavar="N", help="updates between log lines"
    )
    group.add_argument(
        "--log-tensorboard",
        action=BooleanOptionalAction,
        default=False,
        help="event files in the run folder",
    )
    group.add_argument(
        "--log-wandb", action=BooleanOptionalAction, default=False, help="Weights & Biases"
    )
    group.add_argument("--wandb-project", default=None, metavar="NAME", help="default: wandb's")
    group.add_argument(
        "--wandb-tags", nargs="+", default=None, metavar="TAG", help="shown with the run"
    )
    group.add_argument(
        "--wandb-resume-id", default=None, metavar="ID", help="default: the run folder's wandb run"
    )
    group.add_argument("--plot", action=BooleanOptionalAction, default=True, help="curves.png")
    group.add_argument("--seed", type=NATURAL, default=42, help="of everything random")
    group.add_argument(
        "--deterministic", action=BooleanOptionalAction, default=False, help="also on a GPU"
    )
