"""The typed configuration of a training run: every flag of ``train``, by what it is for.

Each part stands beside what it configures, with the function that adds its flags. Defaults are the
recipe that the published families share (AdamW, cosine, five epochs of warm-up, learning rate 5e-4
per 512 images); augmentation is off until asked for, as in timm.

A new option is a field and a flag of the same name, side by side in the part that it belongs to.
"""

from argparse import BooleanOptionalAction
from dataclasses import dataclass

from vitlinear.cli.device import DeviceConfig, add_device_flags
from vitlinear.cli.flags import COUNT, NATURAL, SEED, file_name
from vitlinear.cli.model_flags import InputConfig, ModelConfig, add_input_flags, add_model_flags
from vitlinear.cli.parser import Parser
from vitlinear.data.augmentation import AugmentationConfig, add_augmentation_flags
from vitlinear.data.bad_images import add_bad_images_flag
from vitlinear.data.dataset import DataConfig, add_data_flags

from .average import AverageConfig, add_average_flags
from .compilation import CompileConfig, add_compile_flags
from .make_model import RegularisationConfig, add_regularisation_flags
from .optimiser import OptimiserConfig, add_optimiser_flags
from .parallel import ParallelConfig, add_parallel_flags
from .record.folder import FolderConfig, add_folder_flags
from .record.trackers import RecordConfig, add_record_flags
from .schedule import ScheduleConfig, add_schedule_flags
from .start_weights import StartConfig, add_start_flags
from .tasks import DistillationConfig, add_distillation_flags


@dataclass(frozen=True)
class RunConfig:
    """How a run goes: its random numbers, its evaluations, and what it survives."""

    recovery_interval: int
    max_nonfinite: int
    validation_batch_size: int | None
    eval_metric: str
    seed: int
    deterministic: bool


@dataclass(frozen=True)
class TrainConfig:
    """Everything that ``train`` is told; the field of a flag has its name.

    Attributes:
        config: File of flag values that the command line was laid over.
        print_config: Whether to print the configuration and end.
        train_split: Name of the training data.
        bad_images: What becomes of unreadable images, ``error`` or ``skip``.
    """

    config: str | None
    print_config: bool
    train_split: str
    bad_images: str
    data: DataConfig
    model: ModelConfig
    input: InputConfig
    start: StartConfig
    regularisation: RegularisationConfig
    compilation: CompileConfig
    parallel: ParallelConfig
    optimiser: OptimiserConfig
    schedule: ScheduleConfig
    augmentation: AugmentationConfig
    average: AverageConfig
    distillation: DistillationConfig
    folder: FolderConfig
    record: RecordConfig
    run: RunConfig
    device: DeviceConfig


def add_train_flags(parser: Parser) -> None:
    """Adds the flags of `TrainConfig`, in the order of ``--help``."""
    add_data_flags(parser)
    add_bad_images_flag(parser)
    add_model_flags(parser, default="ravlt_t")
    add_input_flags(parser)
    add_start_flags(parser)
    add_regularisation_flags(parser)
    add_compile_flags(parser)
    add_parallel_flags(parser)
    add_optimiser_flags(parser)
    add_schedule_flags(parser)
    parser.group("augmentation").add_argument(
        "--train-split", default="train", metavar="NAME", help="name of the training data"
    )
    add_augmentation_flags(parser)
    add_average_flags(parser)
    add_distillation_flags(parser)
    add_config_flags(parser)
    add_folder_flags(parser)
    add_run_flags(parser)
    add_record_flags(parser)
    add_device_flags(parser)


def add_config_flags(parser: Parser) -> None:
    """Adds ``--config`` and ``--print-config``."""
    group = parser.group("run")
    group.add_argument(
        "-c", "--config", type=file_name, default=None, metavar="FILE", help="YAML of flag values"
    )
    group.add_argument(
        "--print-config",
        action="store_true",
        help="print every flag as --config and command line leave it, as YAML, and end",
    )


def add_run_flags(parser: Parser) -> None:
    """Adds the flags of `RunConfig`."""
    group = parser.group("run")
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
    group.add_argument("--seed", type=SEED, default=42, help="of everything random")
    group.add_argument(
        "--deterministic", action=BooleanOptionalAction, default=False, help="also on a GPU"
    )
