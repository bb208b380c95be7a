"""`vitlinear.stream`: the whole call."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from vitlinear.create import data_config
from vitlinear.errors import UserError
from vitlinear.files import check_no_input, make_folder
from vitlinear.models._isotropic import IsotropicBackbone
from vitlinear.rows.steps import check_head, steps_of

from .maps import RowMap
from .memory import parse_memory
from .peers import Peers
from .record import Record, sole_use
from .run import Plan, Readable, Runner, module_example, plan_steps, pooled
from .sinks import COPIES, Writer, Writers, block_rows, check_shape, check_sink
from .sources import ImageSource, RasterSource, open_source
from .tissue import Mask, make_mask
from .views import PCA, Head, HeadMap, MaskedMap, PrincipalComponents

Output = str | int | PCA | Head


def stream(
    model: Any,
    source: Any,
    sink: Any = None,
    *,
    output: Output | Sequence[Output] = "logits",
    memory: int | str = "4GiB",
    workdir: str | Path | None = None,
    layout: str | None = None,
    level: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    band_rows: int | None = None,
    mask: Any = None,
    mesh: DeviceMesh | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Any:
    """Run a model on an image that does not fit into memory, with the results of the whole image.

    Each layer runs on one band of rows after the other. Results are those of ``model(image)`` but
    for the order of sums.

    Args:
        model: A model of this package, in eval mode.
        source: The image: an array [C, H, W] or [H, W, C], such as a numpy array, a memory map,
            zarr, a tensor; a slide of tiffslide or openslide; a raster of rasterio; or the path of
            a ``.npy``, ``.zarr`` or TIFF file. Integers are pixels, which are scaled and normalised
            as the model wants them, of 8 or 16 bits without a sign; floating point numbers are
            taken as they are. Missing data of a raster count as the mean, 0.
        sink: Where the map of the output goes: an array [C, h, w], or the path of a ``.npy``,
            ``.zarr`` or TIFF file; for several outputs a dictionary of these by output. None to
            return it.
        output: ``'logits'``, as the model returns them; ``'features'``, as its `forward_features`;
            a number i, the map i of its `forward_intermediates`; a `PCA` or a `Head` of these; or
            several outputs.
        memory: Bytes that the process may hold in memory, itself included, such as ``'4GiB'``.
        workdir: Folder for what is too large for memory; None to keep it in memory. The same call
            goes on from where an earlier one with this folder was interrupted.
        layout: ``'CHW'`` or ``'HWC'`` where the shape does not tell.
        level: Of the pyramid of a slide or a TIFF file; 0 has all pixels.
        mean: Of the channels of pixels, from 0 to 1; by default the model's.
        std: Likewise.
        band_rows: Rows of the output that each layer makes at once; None for as many as fit.
        mask: Places of the maps that are kept, the others hold NaN: ``'tissue'``, which
            `vitlinear.streaming.tissue` defines, ``'valid'``, where a raster has data, or an array
            [h, w] of truth values over the whole image. What is kept is what it is without a mask.
        mesh: Of one dimension: the processes that share the bands. All make the same call, with a
            workdir that all of them see; the first one writes the sinks, and interrupted calls go
            on from the last finished layer.
        overwrite: Replace files that are to be written.
        progress: Show a progress bar.

    Returns:
        The output, or a dictionary of the outputs asked for; of one that has a sink, the sink. With
        a workdir, maps lie in its files and are gone with them; where every map has a sink, the
        files are removed.

    Raises:
        UserError: The model has a layer that cannot be split into bands, memory or disk do not
            suffice, or the image cannot be read; the message says which.
    """
    example = module_example(model)
    peers = Peers(mesh, example.device)
    with peers.one_fate(), torch.no_grad(), ExitStack() as held:
        outputs, alone = named_outputs(output)
        if sink is not None and not isinstance(sink, dict) and len(outputs) > 1:
            raise UserError("several outputs need a dictionary of sinks, by output")
        sinks = sink if isinstance(sink, dict) else {} if sink is None else {outputs[0]: sink}
        written = sinks if peers.rank == 0 else {}
        check_sinks(sinks, outputs, overwrite, source, workdir)
        if band_rows is not None and band_rows < 1:
            raise UserError(f"band_rows must be at least 1, got {band_rows}")
        if peers.size > 1 and workdir is None:
            raise UserError("processes that share an image need a workdir that all of them see")
        budget = parse_memory(memory)
        steps = steps_of(model)
        opened = open_source(source, model.in_chans, layout, level)
        image = Pixels(opened, model, example, mean, std)
        if "logits" in outputs:
            check_head(model)
        if mask is not None and "logits" in outputs:
            raise UserError("a mask is for maps, and logits come of all places: leave one out")
        plans = plan_steps(steps, image.shape, example)
        numbers = {name: _numbers_of(name, plans, model) for name in outputs}
        needed = {number for found in numbers.values() for number in found}
        plans = plans[: max(needed) + 1]
        plain: dict[Output, int] = {
            name: n[0] for name, n in numbers.items() if isinstance(name, (str, int))
        }
        kept = None if mask is None else make_mask(mask, opened)
        folder = record = None
        if workdir is not None:
            folder = Path(workdir).expanduser()
            make_folder(folder)
            if peers.rank == 0:
                held.enter_context(sole_use(folder))
            record = Record(folder, _description(model, image, numbers, band_rows))
        opened.forget()
        runner = Runner(
            example, budget, folder, record, band_rows, progress and peers.rank == 0, peers
        )
        runner.set_aside(
            [(opened.block_bytes, f"the blocks of {opened.row_block} rows of the image")]
        )
        heads = {
            name: HeadMap(name, [plans[n].after for n in found], runner.memory, example)
            for name, found in numbers.items()
            if isinstance(name, Head)
        }
        rows: dict[Output, int] = {}
        blocks = []
        for name, place in sinks.items():
            shape, size = plans[numbers[name][0]].after, example.element_size()
            if isinstance(name, PCA):
                shape, size = (*shape[:2], 3), 1
            elif isinstance(name, Head):
                shape = heads[name].shape
            check_shape(place, shape)
            rows[name] = block_rows(place, shape, size, runner.memory // 16)
            taken = COPIES * rows[name] * math.prod(shape[1:]) * size
            where = place if isinstance(place, (str, Path)) else "an array"
            blocks.append((taken, f"the blocks of {rows[name]} rows of the map for {where}"))
        runner.set_aside(blocks)
        raster = opened.raster if isinstance(opened, RasterSource) else None
        with Writers(raster) as writers:

            def open_writers(number: int, made: RowMap) -> list[Writer]:
                stride = _stride(plans[: number + 1])
                view: Any = made if kept is None else MaskedMap(made, kept)
                names = [name for name in written if plain.get(name) == number]
                return [writers.open(view, rows[name], sinks[name], stride) for name in names]

            maps = runner.run(plans, image, needed, open_writers)
            made: dict[Output, Any] = {}
            for name, found in numbers.items():
                if name in plain:
                    if name not in sinks:
                        made[name] = _assemble(name, maps[found[0]], model, example, kept)
                    continue
                made_of = [maps[n] for n in found]
                if isinstance(name, Head):
                    heads[name].use(made_of, runner.left(made_of))
                    view: Any = heads[name]
                else:
                    pixels = runner.left(made_of) // 32  # rows are widened, and copied
                    some = max(pixels // math.prod(made_of[0].shape[1:]), 1)
                    view = PrincipalComponents(made_of[0], kept, some)
                view = view if kept is None else MaskedMap(view, kept)
                if name in written:
                    stride = _stride(plans[: found[-1] + 1])
                    if isinstance(name, Head):
                        stride /= heads[name].scale
                    writer = writers.open(view, rows[name], sinks[name], stride)
                    writer.write_until(view.shape[0])
                elif name not in sinks:
                    made[name] = view.read(0, view.shape[0]).permute(0, 3, 1, 2)
        made |= sinks
        peers.share()  # with maps that others may still read, the files go
        if record is not None and all(
            name in sinks or name not in plain or name == "logits" for name in outputs
        ):
            if peers.rank == 0:
                record.delete()
            for finished in maps.values():
                finished.delete()
    return made[outputs[0]] if alone else made


def named_outputs(output: Any) -> tuple[tuple[Output, ...], bool]:
    """The outputs that are asked for, and whether it is one that is not in a list.

    Raises:
        UserError: There is none, or one that is no output.
    """
    alone = isinstance(output, (str, PCA, Head)) or not isinstance(output, Iterable)
    outputs: list[Output] = []
    for name in (output,) if alone else output:
        try:
            outputs.append(name if isinstance(name, (str, PCA, Head)) else operator.index(name))
        except TypeError as error:
            raise UserError(
                f"{name!r} is no output: give 'logits', 'features', the number of a map, a PCA or "
                "a Head"
            ) from error
    if not outputs:
        raise UserError("no output is asked for: give one at least")
    return tuple(outputs), alone


def check_sinks(
    sinks: dict[Output, Any],
    outputs: Sequence[Output],
    overwrite: bool,
    source: Any,
    workdir: str | Path | None,
) -> None:
    """Check the places for maps before anything runs.

    Args:
        sinks: The places by output.
        outputs: Those that are asked for.
        overwrite: Whether files may be there.
        source: The image, which no place may be in.
        workdir: Likewise.

    Raises:
        UserError: One belongs to no output or to two, or cannot be written.
    """
    taken: list[Any] = []
    if not isinstance(source, (str, Path)):
        source = getattr(source, "filename", None)  # of a memory map
    for name, place in sinks.items():
        if name not in outputs:
            raise UserError(f"there is a sink for {name!r}, which is no output that was asked for")
        if name == "logits":
            raise UserError(
                "logits are returned: a sink takes a map; ask for output='features', or the number "
                "of a map"
            )
        check_sink(place, overwrite)
        if not isinstance(place, (str, Path)):
            if any(place is other for other in taken):
                raise UserError("two outputs have one array as their sink: give each its own")
            taken.append(place)
            continue
        check_no_input(place, (source,))
        path = Path(place).expanduser().resolve()
        if path in taken:
            raise UserError(f"two outputs are to be written to {place}: give each its own sink")
        taken.append(path)
        for folder, holds in ((source, "the image"), (workdir, "what a later call goes on from")):
            if folder and path.is_relative_to(Path(folder).expanduser().resolve()):
                raise UserError(f"cannot write {place}: it is in {folder}, which holds {holds}")


def _stride(plans: Sequence[Plan]) -> float:
    """Pixels of the image in a row of the map that some steps make."""
    return math.prod(plan.step.stride for plan in plans)


class Pixels:
    """An image as the model takes it.

    Attributes:
        shape: Height, width and channels.
        prefix: None: an image has no tokens before it.
    """

    prefix: Tensor | None = None

    def __init__(
        self,
        source: ImageSource,
        model: Any,
        example: Tensor,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        self.source = source
        self.shape = source.shape
        given = {"mean": mean, "std": std}
        config = data_config(model, {k: tuple(v) for k, v in given.items() if v is not None})
        dtype = torch.float64 if example.dtype == torch.float64 else torch.float32
        self.mean = torch.tensor(config.mean, dtype=dtype)
        self.std = torch.tensor(config.std, dtype=dtype)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [1, stop - start, W, C]; 0, the mean, where the image has no data.

        Raises:
            UserError: Rows cannot be read, or hold numbers that are not finite.
        """
        rows = self.source.read(start, stop)
        pixels = not rows.is_floating_point()
        if pixels:
            scale = torch.iinfo(torch.uint8).max if rows.dtype == torch.uint8 else 65535
            rows = (rows.to(self.mean.dtype) / scale - self.mean) / self.std
        valid = self.source.valid(start, stop)
        if valid is not None:
            rows = rows.masked_fill(~valid, 0)
        if pixels:  # which are always finite
            return rows
        finite = rows.isfinite().flatten(2).all(2)[0]
        if not finite.all():
            raise UserError(
                f"row {start + int(finite.int().argmin())} of the image holds numbers that are not "
                "finite: fill them in, or give a raster that names its value for missing data"
            )
        return rows


def _numbers_of(output: Output, plans: list[Plan], model: Any) -> list[int]:
    """The steps whose maps an output is made of.

    Raises:
        UserError: There is no such output.
    """
    if isinstance(output, PCA):
        return [_number_of(output.of, plans, model)]
    if isinstance(output, Head):
        return [_number_of(name, plans, model) for name in output.maps]
    return [_number_of(output, plans, model)]


def _number_of(output: str | int, plans: list[Plan], model: Any) -> int:
    """The step whose map an output is made of.

    Raises:
        UserError: There is no such output.
    """
    if output in ("logits", "features"):
        return len(plans) - 1
    found = [i for i, plan in enumerate(plans) if plan.step.level == output]
    if isinstance(output, str) or not found:
        levels = [plan.step.level for plan in plans if plan.step.level is not None]
        raise UserError(
            f"{type(model).__name__} has no output {output!r}; choose from: logits, features, "
            f"{', '.join(map(str, levels))}"
        )
    return found[0]


def _assemble(
    output: Output, made: RowMap, model: Any, example: Tensor, mask: Mask | None
) -> Tensor:
    """An output in the shape that the model gives it."""
    isotropic = isinstance(model, IsotropicBackbone)
    if output == "logits":
        return _logits(made, model, example)
    x = made.whole() if mask is None else MaskedMap(made, mask).read(0, made.shape[0])
    if output == "features" and isotropic:
        tokens = x.flatten(1, 2)
        return tokens if made.prefix is None else torch.cat((made.prefix.to(x.device), tokens), 1)
    return x.permute(0, 3, 1, 2)


def _logits(made: Readable, model: Any, example: Tensor) -> Tensor:
    isotropic = isinstance(model, IsotropicBackbone)
    kind = model.global_pool if isotropic else model.head.global_pool.pool_type
    rows = max(2**22 // (made.shape[1] * made.shape[2]), 1)
    if not kind:
        parts = []
        for start in range(0, made.shape[0], rows):
            x = made.read(start, min(start + rows, made.shape[0])).to(example.device)
            if isotropic:
                parts.append(model.forward_head(x.flatten(1, 2)))
            else:
                parts.append(model.forward_head(x.permute(0, 3, 1, 2)))
        if made.prefix is not None:
            parts.insert(0, model.forward_head(made.prefix))
        return torch.cat(parts, 1 if isotropic else 2)
    if not isotropic:
        return model.forward_head(pooled(made, rows, kind, example)[:, :, None, None])
    # One token for all of the map: whichever pooling the model has then gives this one.
    if kind == "token":
        place = made.read(0, 1)[:, 0, :1].to(example.device)
    else:
        place = pooled(made, rows, kind, example)[:, None]
    tokens = place if made.prefix is None else torch.cat((made.prefix, place), 1)
    return model.forward_head(tokens)


def _description(
    model: Any, image: Pixels, numbers: dict[Output, list[int]], band_rows: int | None
) -> dict[str, Any]:
    """The things that tell a run from others, which must not go on from its records."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    height = image.shape[0]
    for row in sorted({0, height // 3, height // 2, height - 1}):
        digest.update(image.read(row, row + 1).contiguous().view(torch.uint8).numpy().data)
    return {
        "model": repr(model),
        "content": digest.hexdigest(),
        "shape": image.shape,
        "outputs": [
            x if isinstance(x, (str, int)) else f"{type(x).__name__} of steps {found}"
            for x, found in numbers.items()
        ],
        "band_rows": band_rows,
    }
