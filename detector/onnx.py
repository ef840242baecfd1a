"""A detector as one ONNX graph: pixels in; score, verdict and heatmap out. Needs onnx, onnxscript and onnxruntime."""

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import RunStopped, UserError
from common.files import disk_errors, write_whole
from common.progress import progress
from datasets.listing import printable
from detector.detector import Detector, blurred, upright
from detector.pictures import Unreadable, pictures_of, read

_OPSET = 18  # the first whose Resize has an anti-aliasing filter
# By how much scores may differ; relative to their size beyond 1. Of normal pictures they are about -1.
TOLERANCE = 1e-5


class _Whole(nn.Module):
    """A prepared picture (1, 3, S, S) -> score (1,), anomalous (1,), heatmap (S, S), if it has one."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.net, self.size = detector.net, detector.size
        # A score is a float32, the threshold one of such scores.
        self.register_buffer("threshold", torch.tensor([detector.threshold.value], dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        score, maps = self.net(x)
        heat = [upright(far, self.size) for far in maps if far.shape[1] > 1]
        found = (score, score < self.threshold)
        return (*found, blurred(torch.stack(heat).mean(0))[0, 0]) if heat else found


def export(detector: Detector, path: Path, check: Path | None = None) -> None:
    """Write the graph, once its scores are those of the detector on the pictures of `check`, and on noise.

    Raises: UserError where packages are missing; RunStopped where scores differ.
    """
    if path.is_dir():
        raise UserError(f"--onnx: {printable(path)} is a folder; give a file")
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--onnx: needs {error.name}; pip install onnx onnxscript onnxruntime") from None
    whole = graph(detector)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(whole, options, providers=["CPUExecutionProvider"])
    worst, count = _compare(detector, session, check)
    if not worst <= TOLERANCE:
        raise RunStopped(f"scores of the graph differ by {worst:.2g}, more than {TOLERANCE:g}; nothing is written")
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path.parent):
        write_whole(path, lambda file: file.write(whole))
    outputs = ", ".join(each.name for each in session.get_outputs())
    print(f"scores of {count} pictures differ by {worst:.1e} at most")
    print(f"wrote {printable(path)}: picture (height, width, 3), uint8, to {outputs}")


def graph(detector: Detector) -> bytes:
    """The ONNX graph, serialised."""
    import onnx
    from onnx import TensorProto, compose, helper

    net, size = _Whole(detector).eval(), detector.size
    names = ["score", "anomalous", *(["heatmap"] if detector.looks_at_places else [])]
    buffer: Any = io.BytesIO()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (torch.zeros(1, 3, size, size),), buffer, input_names=["prepared"], output_names=names,
            opset_version=_OPSET, dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    rest = onnx.load_from_string(buffer.getvalue())
    nodes, constants = _resize(size)
    before = helper.make_graph(
        nodes, "pixels",
        [helper.make_tensor_value_info("picture", TensorProto.UINT8, ["height", "width", 3])],
        [helper.make_tensor_value_info("small", TensorProto.FLOAT, [1, 3, size, size])],
        constants,
    )  # fmt: skip
    first = helper.make_model(before, opset_imports=rest.opset_import, ir_version=rest.ir_version)
    whole = compose.merge_models(first, rest, io_map=[("small", "prepared")])
    facts = {"threshold": repr(detector.threshold.value), "false_alarms": str(detector.threshold),
             "method": " ".join(detector.config["method"])}  # fmt: skip
    helper.set_model_props(whole, facts)
    onnx.checker.check_model(whole)
    return bytes(whole.SerializeToString())


def _resize(size: int) -> tuple[list[Any], list[Any]]:
    """Nodes and constants of `features.resized`: pixels times a matrix of each side's interpolation weights.

    ONNX has a Resize with an anti-aliasing filter, but that of onnxruntime is off by a thousandth of white and more.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Shape", ["picture"], ["shape"]),
        helper.make_node("Cast", ["picture"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["channels"], perm=[2, 0, 1]),
    ]
    for side, place in (("height", "at0"), ("width", "at1")):

        def add(kind: str, inputs: list[str], output: str, side: str = side, **more: Any) -> None:
            own = [name.replace("$", side) for name in inputs]
            nodes.append(helper.make_node(kind, own, [output.replace("$", side)], **more))

        # weight of pixel j for output i: max(0, 1 - |j + 0.5 - (i + 0.5) r| / max(r, 1)), r = pixels / size, in float64
        add("Gather", ["shape", place], "$ count", axis=0)
        add("Cast", ["$ count"], "$ pixels", to=TensorProto.DOUBLE)
        add("Div", ["$ pixels", "size"], "$ ratio")
        add("Max", ["$ ratio", "one"], "$ support")
        add("Range", ["zero", "$ pixels", "one"], "$ index")
        add("Add", ["$ index", "half"], "$ middle")
        add("Mul", ["centres", "$ ratio"], "$ centre")
        add("Sub", ["$ middle", "$ centre"], "$ off")
        add("Abs", ["$ off"], "$ far")
        add("Div", ["$ far", "$ support"], "$ share")
        add("Sub", ["one", "$ share"], "$ signed")
        add("Max", ["$ signed", "zero"], "$ raw")
        add("ReduceSum", ["$ raw", "last"], "$ sum", keepdims=1)
        add("Div", ["$ raw", "$ sum"], "$ exact")
        add("Cast", ["$ exact"], "$ weights", to=TensorProto.FLOAT)
    nodes += [
        helper.make_node("Transpose", ["width weights"], ["width columns"], perm=[1, 0]),
        helper.make_node("MatMul", ["channels", "width columns"], ["narrow"]),
        helper.make_node("MatMul", ["height weights", "narrow"], ["resized"]),
        helper.make_node("Div", ["resized", "white"], ["shares"]),
        helper.make_node("Unsqueeze", ["shares", "first"], ["small"]),
    ]
    values = {
        "at0": np.int64(0), "at1": np.int64(1), "size": np.float64(size), "zero": np.float64(0),
        "one": np.float64(1), "half": np.float64(0.5), "centres": np.arange(size)[:, None] + 0.5,
        "last": np.array([-1]), "first": np.array([0]), "white": np.float32(255),
    }  # fmt: skip
    return nodes, [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]


def _compare(detector: Detector, session: Any, check: Path | None) -> tuple[float, int]:
    """The largest difference of scores, and of how many pictures. A verdict that differs counts as infinite."""
    rng = np.random.default_rng(0)
    shapes = [(detector.size, detector.size), (97, 301), (640, 480)]
    pictures: list[np.ndarray] = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    paths = list(pictures_of([check])) if check is not None else []
    reader, worst, count = detector.reader(), 0.0, 0
    every: list[np.ndarray | Path] = [*pictures, *paths]
    for item in progress(every, total=len(pictures) + len(paths), label="comparing"):
        pixels = item if isinstance(item, np.ndarray) else read(item, reader)
        if isinstance(pixels, Unreadable):
            continue
        own = float(detector.score_samples([pixels])[0])
        score, anomalous = (float(x[0]) for x in session.run(["score", "anomalous"], {"picture": pixels}))
        worst, count = max(worst, abs(own - score) / max(1, abs(own))), count + 1
        if bool(anomalous) != (own < detector.threshold.value) and abs(own - detector.threshold.value) > TOLERANCE:
            worst = float("inf")
    return worst, count
