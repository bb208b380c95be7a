"""`vitlinear benchmark`: a run in every runtime, rows of files, and mistakes in one line."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch

from tests.commands import Command
from vitlinear.benchmark import command as benchmark_command
from vitlinear.benchmark import programs, report, runtimes, subject
from vitlinear.benchmark.programs import (
    Size,
    check_file,
    images,
    multiply_adds,
    of_file,
    parse_sides,
)
from vitlinear.benchmark.subject import Case
from vitlinear.errors import UserError, pip_install

pytestmark = pytest.mark.usefixtures("fork_server")

MODEL = "test_linear_deit"
QUICK = ("--rounds", 2, "--seconds", 0.001, "--threads", 1)
SIZE = Size(2, 32, 48)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets variables of its process."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def write_means(path: Path, dtype: str = "float32", **metadata: str) -> Path:
    """An ONNX program of any size that takes the means of channels, times a 3 x 3 matrix."""
    helper, kind = onnx.helper, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weight = onnx.numpy_helper.from_array(2 * np.eye(3, dtype=dtype), "w")
    axes = onnx.numpy_helper.from_array(np.array([2, 3]), "axes")
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=0),
            helper.make_node("MatMul", ["m", "w"], ["y"]),
        ],
        "means",
        [helper.make_tensor_value_info("x", kind, ["batch", 3, "height", 48])],
        [helper.make_tensor_value_info("y", kind, ["batch", 3])],
        [weight, axes],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {"model": MODEL, **metadata})
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def means(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_means(tmp_path_factory.mktemp("onnx") / "means.onnx")


@pytest.mark.process
@pytest.mark.quick
@pytest.mark.slow
def test_every_runtime(command: Command, tmp_path: Path, means: Path) -> None:
    output, picture = tmp_path / "rows.json", tmp_path / "rows.svg"
    names = ["pytorch", "onnxruntime", "openvino"]
    flags = ["--sizes", "32x48", "-b", 2, *QUICK, "--profile"]
    files = ["--output", output, "--plot", picture]
    result = command("benchmark", MODEL, means, "--runtime", *names, *flags, *files)
    assert result.code == 0, result.err
    record = json.loads(output.read_text())
    assert record["command"].startswith(f"vitlinear benchmark {MODEL} ")
    assert "1 threads used" in record["machine"] and record["reference"] == MODEL
    assert {"torch", "timm", "onnxruntime", "openvino"} <= set(record["versions"])
    rows = record["rows"]
    assert [(row["model"], row["runtime"]) for row in rows] == [
        *((MODEL, name) for name in names),
        *((means.name, name) for name in names[1:]),
    ]
    for row in rows:
        assert "error" not in row, row
        assert len(row["round_ms"]) == 2 <= row["calls"]
        assert 0 < row["p10_ms"] <= row["p50_ms"] <= row["p90_ms"]
        assert row["images_per_s"] == pytest.approx(2e3 / row["p50_ms"])
        assert 0 < row["multiplying_ms"] < sum(row["kinds_ms"].values())
        if row["model"] == MODEL:
            assert row["difference"] < 1e-4 and row["gmacs"] > 1e-3
    assert result.out.count(f"\n| {MODEL}") == 3 and "of pytorch" in result.out
    assert str(tmp_path) not in output.read_text().replace(record["command"], "")
    assert picture.read_text().lstrip().startswith("<?xml")
    assert sorted(tmp_path.iterdir()) == [output, picture]


def test_rows_of_a_size_are_written_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "rows.json"

    def rows(config: object, size: Size) -> list[dict[str, object]]:
        if size.height == 64:
            raise KeyboardInterrupt
        return [{"model": MODEL}]

    monkeypatch.setattr(benchmark_command, "_rows", rows)
    with pytest.raises(KeyboardInterrupt):
        benchmark_command.main([MODEL, "--sizes", "32", "64", "--output", str(output)])
    assert json.loads(output.read_text())["rows"] == [{"model": MODEL}]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_file_is_run_at_the_size_asked_for(runtime: str, means: Path) -> None:
    ready = runtimes.RUNTIMES[runtime].prepare("means", str(means), SIZE, 1)
    expected = 2 * images(SIZE).mean((2, 3))
    torch.testing.assert_close(torch.from_numpy(ready.run()), expected, atol=1e-6, rtol=1e-4)
    assert "MatMul" in "".join(ready.profile()) or "FullyConnected" in ready.profile()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_file_gets_images_of_its_own_type(runtime: str, dtype: str, tmp_path: Path) -> None:
    file = write_means(tmp_path / "means.onnx", dtype)
    assert check_file(str(file), SIZE) == MODEL
    ready = runtimes.RUNTIMES[runtime].prepare("means", str(file), SIZE, 1)
    expected = 2 * images(SIZE).mean((2, 3))
    torch.testing.assert_close(
        torch.from_numpy(ready.run()).float(), expected, atol=2e-3, rtol=2e-3
    )


def test_data_beside_a_link(tmp_path: Path) -> None:
    """As in a hub's cache: the data have their name beside the link, not beside the file."""
    model, blob = onnx.load(write_means(tmp_path / "means.onnx")), tmp_path / "blobs" / "1f2e"
    onnx.save(
        model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=60
    )
    blob.parent.mkdir()
    (tmp_path / "m.onnx").rename(blob)
    (tmp_path / "m.onnx").symlink_to(blob)
    file = of_file(str(tmp_path / "m.onnx"), SIZE).files["onnxruntime"]
    assert runtimes.RUNTIMES["onnxruntime"].prepare("m", file, SIZE, 1).run().shape == (2, 3)


@pytest.mark.parametrize(
    ("metadata", "origin"),
    [
        ({}, MODEL),
        ({"made_by": "vitlinear 1", "model_kwargs": '{"img_size": 64}'}, MODEL),
        ({"model": "ravlt_t.in1k"}, "ravlt_t.in1k"),
        ({"made_by": "another tool"}, ""),
        ({"model_kwargs": '{"depth": 2}'}, ""),
        ({"model_kwargs": "foo"}, ""),
        ({"model_kwargs": "[1]"}, ""),
    ],
)
def test_the_model_that_a_file_is_compared_with(
    metadata: dict[str, str], origin: str, tmp_path: Path
) -> None:
    """In PyTorch, a model is built by its name alone."""
    assert check_file(str(write_means(tmp_path / "a.onnx", **metadata)), SIZE) == origin


@pytest.mark.process
def test_what_cannot_be_exported_still_runs_in_pytorch(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise UserError("torch.onnx makes no ONNX of this model")

    monkeypatch.setattr(programs, "write", refuse)
    names = ["pytorch", "onnxruntime"]
    result = command("benchmark", MODEL, "--sizes", 32, "--runtime", *names, *QUICK)
    assert result.code == 0, result.err
    assert f"| {MODEL} | pytorch | 1 x 32 x 32 | " in result.out
    row = next(line for line in result.out.splitlines() if "| onnxruntime |" in line)
    assert "torch.onnx makes no ONNX of this model" in row


@pytest.mark.process
def test_a_model_with_a_path_in_its_name(command: Command, tmp_path: Path) -> None:
    model = timm.create_model(MODEL, num_classes=5)
    folder = tmp_path / "pushed"
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    name = f"local-dir:{folder}"
    flags = ["--sizes", 32, "--runtime", "pytorch", *QUICK]
    result = command("benchmark", name, *flags)
    assert result.code == 0, result.err
    assert f"| of {name} |" in result.out and f"\n| {name} | pytorch |" in result.out


def test_logits_of_another_model_are_refused(means: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.ones((2, 3), np.float32))
    expected = str(tmp_path / "other.npy")
    case = Case("means", "onnxruntime", 2, 32, 48, 1, "", str(means), "", expected, None, False)
    with pytest.raises(ArithmeticError, match="logits differ from those of the model"):
        subject.prepare(case)


def test_multiply_adds_of_a_linear_model() -> None:
    """Each column of patches costs the same."""
    costs = [multiply_adds(MODEL, Size(1, 32, 16 * columns)) for columns in (2, 3, 4)]
    assert costs[2] - costs[1] == costs[1] - costs[0] > 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["ravlt_x"], ["unknown model 'ravlt_x'", "did you mean ravlt_"]),
        (["test_vit", "--sizes", "8"], ["test_vit takes no images of 8 x 8 pixels"]),
        ([MODEL, "--sizes", "8x"], ["--sizes: '8x' is neither a side"]),
        ([MODEL, "--runtime", "tvm"], ["tvm", "openvino"]),
        ([MODEL, MODEL], ["two MODELs have the same name"]),
        ([MODEL, "--reference", "test_vi"], ["--reference test_vi is not among"]),
        ([MODEL, "--plot", "a.bmp"], ["--plot a.bmp", ".png or .svg"]),
        ([MODEL, "--output", "none/a.json"], ["cannot write none/a.json"]),
        (
            [MODEL, "--output", "a.svg", "--plot", "./A.svg"],
            ["--output and --plot are both A.svg: g"],
        ),
        (["{shapeless}"], ["shapeless.onnx does not say which images it takes"]),
        (["none.onnx"], ["none.onnx does not exist"]),
        (["none.onnx", "--runtime", "pytorch"], ["none.onnx is a file", "openvino"]),
        (["README.onnx"], ["README.onnx is no ONNX program"]),
        (["{bytes}", "--sizes", "32x48"], ["bytes.onnx takes uint8: its images have to be norm"]),
        (["{means}", "--sizes", "32"], ["takes images of batch x 3 x height x 48, not 1 x 3 x 32"]),
    ],
)
def test_mistakes(
    flags: list[str],
    says: list[str],
    command: Command,
    means: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("README.onnx").write_text("no program")
    files = {"means": means, "bytes": write_means(means.with_name("bytes.onnx"), "uint8")}
    files["shapeless"] = means.with_name("shapeless.onnx")
    shapeless = onnx.load(means)
    shapeless.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(shapeless, files["shapeless"])
    result = command("benchmark", *(flag.format(**files) for flag in flags))
    assert result.code == 2 and result.err.count("\n") == 1, result.err
    assert result.err.startswith("error: ") and all(part in result.err for part in says), result.err
    assert [path.name for path in tmp_path.iterdir()] == ["README.onnx"]


@pytest.mark.parametrize(
    ("missing", "flags", "says"),
    [
        ("openvino", [], f"--runtime openvino needs openvino: {pip_install('export,openvino')}"),
        ("onnxruntime", ["--runtime", "onnxruntime"], pip_install("export")),
        ("matplotlib", ["--runtime", "pytorch", "--plot", "a.png"], "--plot needs matplotlib"),
    ],
)
def test_what_is_not_installed(
    missing: str, flags: list[str], says: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == missing else find(name)
    )
    result = command("benchmark", MODEL, "--sizes", 32, *flags)
    assert result.code == 2 and says in result.err, result.err


@pytest.mark.parametrize(
    ("runtime", "kind", "multiplies"),
    [
        ("pytorch", "aten::linear", True),
        ("pytorch", "mkldnn::_linear_pointwise", True),
        ("pytorch", "aten::mkldnn_convolution", True),
        ("pytorch-compiled", "aten::addmm", True),
        ("pytorch", "vitlinear::linear", True),
        ("pytorch", "vitlinear::rotate", False),
        ("pytorch", "vitlinear::matmul", True),
        ("pytorch", "vitlinear::sdpa", True),
        ("pytorch", "aten::_scaled_dot_product_flash_attention_for_cpu", True),
        ("pytorch", "aten::_slow_conv2d_forward", True),
        ("pytorch", "aten::conv_transpose2d", True),
        ("pytorch", "aten::addmv_", True),
        ("pytorch", "aten::upsample_bilinear2d", False),
        ("pytorch", "aten::_upsample_bilinear2d_aa", False),
        ("pytorch", "aten::upsample_linear1d", False),
        ("pytorch", "aten::upsample_trilinear3d", False),
        ("pytorch", "aten::_cummax_helper", False),
        ("pytorch", "aten::digamma", False),
        ("pytorch", "mkldnn::_reorder_linear_weight", False),
        ("onnxruntime", "FusedMatMul", True),
        ("onnxruntime", "GemmaRotaryEmbedding", False),
        ("onnxruntime", "NhwcFusedConv", True),
        ("onnxruntime", "Einsum", True),
        ("onnxruntime", "Softmax", False),
        ("openvino", "FullyConnected", True),
    ],
)
def test_what_multiplies(runtime: str, kind: str, multiplies: bool) -> None:
    """The part before ``::`` is a library's name, and says nothing."""
    assert runtimes.multiplying(runtime, {kind: 2.0}) == 2.0 * multiplies


TRANSPOSED = onnx.helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2])
SOFTMAX = onnx.helper.make_node("Softmax", ["scores"], ["p"], axis=-1, name="softmax")


@pytest.mark.parametrize(
    ("nodes", "multiplies"),
    [
        (
            [
                TRANSPOSED,
                onnx.helper.make_node("MatMul", ["x", "t"], ["a"], name="qk"),
                onnx.helper.make_node("Mul", ["a", "half"], ["scores"], name="scale"),
                SOFTMAX,
                onnx.helper.make_node("MatMul", ["p", "x"], ["b"], name="pv"),
                onnx.helper.make_node("Mul", ["b", "half"], ["y"], name="other_scale"),
            ],
            True,
        ),
        (
            [
                onnx.helper.make_node("Einsum", ["x", "x"], ["scores"], equation="bhnd,bhmd->bhnm"),
                SOFTMAX,
                onnx.helper.make_node("Einsum", ["p", "x"], ["y"], equation="bhnm,bhmd->bhnd"),
            ],
            True,
        ),
        ([onnx.helper.make_node("Attention", ["x", "x", "x"], ["y"])], True),
        (
            [
                onnx.helper.make_node("Neg", ["x"], ["scores"]),
                SOFTMAX,
                onnx.helper.make_node("Mul", ["p", "half"], ["b"]),
                onnx.helper.make_node("Mul", ["b", "x"], ["y"]),
            ],
            False,
        ),
    ],
    ids=["scaled", "einsum", "attention", "no product"],
)
def test_softmax_attention_of_a_file_counts(
    nodes: list[onnx.NodeProto], multiplies: bool, tmp_path: Path
) -> None:
    """However it is written: OpenVINO makes one step of each on x86."""
    shape = (1, 3, 64, 64)
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in "xy"
    )
    half = onnx.helper.make_tensor("half", onnx.TensorProto.FLOAT, [], [0.5])
    graph = onnx.helper.make_graph(nodes, "attention", [x], [y], [half])
    opsets = [onnx.helper.make_opsetid("", 23)]
    file = str(tmp_path / "attention.onnx")
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), file)
    run = runtimes.RUNTIMES["openvino"].prepare("attention", file, Size(1, 64, 64), 1)
    assert (runtimes.multiplying("openvino", run.profile()) > 0) == multiplies


def test_softmax_attention_counts_where_it_is_one_step_with_others(tmp_path: Path) -> None:
    """OpenVINO makes one of them on x86, of the kind that steps without products have too."""
    size = Size(1, 64, 64)
    program = programs.of_model("test_vit", size, tmp_path, ["openvino"])
    run = runtimes.RUNTIMES["openvino"].prepare("test_vit", program.files["openvino"], size, 1)
    assert any("MatMul" in kind for kind in run.profile())


def test_sizes() -> None:
    assert parse_sides("224") == (224, 224) and parse_sides("480x640")[1] == 640


def row(model: str, runtime: str, side: int, ms: float, **more: object) -> dict[str, object]:
    """A row that was measured."""
    times = {f"p{percent}_ms": ms for percent in (10, 50, 90, 99)}
    size = {"batch": 1, "height": side, "width": side}
    rest = {"origin": model, "round_ms": [ms, ms], "images_per_s": 1e3 / ms}
    return {"model": model, "runtime": runtime, **size, **times, **rest, **more}


def test_table() -> None:
    """Ratios are to the same model in PyTorch, and to the reference in the same runtime."""
    rows = [
        row("a", "pytorch", 224, 8.0, multiplying_ms=3.0, kinds_ms={"mm": 3.0, "add": 3.0}),
        row("a", "openvino", 224, 4.0, multiplying_ms=2.0, kinds_ms={"MatMul": 2.0, "Tile": 0.5}),
        row("a8.onnx", "openvino", 224, 2.0, origin="a"),
        row("b", "openvino", 224, 6.0),
        row("a", "openvino", 448, 16.0),
        {**row("b", "pytorch", 224, 1.0), "error": "out | of memory"},
    ]
    rows += [row("c.in1k", "pytorch", 32, 3.0), row("c.onnx", "openvino", 32, 1.0, origin="c.x")]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in report.table(rows, "b")[2:]
    ]
    assert len({len(line) for line in lines}) == 1
    assert [line[6] for line in lines[:5]] == ["1.00", "2.00", "4.00", "", ""]
    assert [line[7] for line in lines[:5]] == ["", "1.50", "3.00", "1.00", ""]
    assert lines[0][8:] == ["3", "2.00"], "of the profiled call, not of the median"
    assert lines[1][9] == "1.25"
    assert lines[5][3] == "out / of memory"
    assert [line[6] for line in lines[6:]] == ["1.00", "3.00"], "weights do not count"
    (line,) = report.exponents(rows[:6])
    assert line == "a, openvino, batch 1: pixels^1.000, 224x224 to 448x448"


def test_a_plot_of_several_sizes(tmp_path: Path) -> None:
    rows = [row("a", name, side, side / 8) for name in runtimes.RUNTIMES for side in (224, 448)]
    report.plot({"rows": rows, "machine": "a machine"}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
