"""Decoding and suppression in the file and in C++, beside those in torch and NumPy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import Tensor, nn

import edgekd
from edgekd.errors import ModelError
from edgekd.network import Network, Preprocessing
from edgekd.runtimes.detections import append_decoding
from edgekd.runtimes.half import to_half, written_out
from edgekd.runtimes.integer_ends import KEY
from edgekd.runtimes.on_device import detect as on_device
from edgekd.runtimes.onnx_graph import to_onnx
from edgekd.runtimes.onnxruntime import OrtSession
from edgekd.runtimes.tensorrt import compile_check
from edgekd.target import Target
from edgekd.tasks.decoding import Decoding, Level, detect

LEVELS = (
    Level(grid=(6, 8), stride=(8, 8), sizes=((8, 8), (12, 20))),
    Level(grid=(3, 4), stride=(16, 16), offset=0.0, sizes=((24, 16),)),
)
A, K = 6 * 8 * 2 + 3 * 4, 3
CODINGS = {
    "distance": {"boxes": "distance"},
    "log_distance": {"boxes": "log_distance", "quality": True},
    "offset": {"boxes": "offset", "weights": (10, 10, 5, 5), "scores": "softmax",
               "candidates_of": "class", "candidates": 30},
    "distribution": {"boxes": "distribution", "bins": 8},
    "few": {"boxes": "distance", "candidates": 9, "detections": 7},
    "none": {"boxes": "distance", "score_threshold": 0.999999},
}  # fmt: skip


class Heads(nn.Module):
    """The input is what the heads give."""

    def __init__(self, widths: list[int], decoding: Decoding) -> None:
        super().__init__()
        self.widths, self.decoding = widths, decoding

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return dict(zip(("classes", "boxes", "quality"), x.split(self.widths, -1), strict=False))


class Core(nn.Module):
    """One convolution for classes, one for distances, at a stride of 8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.ModuleList(nn.Conv2d(3, width, 8, 8) for width in (K, 4))
        nn.init.normal_(self.maps[0].weight, std=0.2)
        nn.init.constant_(self.maps[1].bias, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        classes, boxes = (m(x).flatten(2).transpose(1, 2) for m in self.maps)
        return {"classes": classes, "boxes": boxes}

    def box_decoding(self, height: int, width: int) -> Decoding:
        level = Level(grid=(height // 8, width // 8), stride=(8, 8), sizes=((12, 12),))
        return Decoding(image=(height, width), levels=(level,), boxes="distance")


@cache
def heads_of(coding: str, **changes) -> tuple[Network, Tensor]:
    """Such a network, and two inputs."""
    given = {"image": (48, 64), "levels": LEVELS, "score_threshold": 0.2} | CODINGS[coding]
    decoding = Decoding(**given | changes)
    widths = [K + decoding.background, 4 * max(decoding.bins, 1), 1][: 2 + decoding.quality]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, A, sum(widths), generator=generator)
    boxes = slice(widths[0], widths[0] + widths[1])
    x[..., boxes] = x[..., boxes] * (3 if decoding.bins else 0.5) + 1
    net = Network(Heads(widths, decoding), torch.zeros(1, A, sum(widths)), decoding=decoding)
    return net, x


def session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path))


def same(found: np.ndarray, wanted: Tensor | np.ndarray) -> None:
    """Within the rounding of float."""
    np.testing.assert_allclose(found, np.asarray(wanted), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=CODINGS)
def bundle(request, tmp_path_factory) -> tuple[Path, Network, Tensor]:
    net, x = heads_of(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    edgekd.export(net, target="host-onnxruntime", out=folder)
    return folder, net, x


def test_the_file_gives_what_torch_detects(bundle):
    folder, net, x = bundle
    wanted = detect(net.io.decoding, net(x))
    there = session(folder / "model.detections.onnx")
    assert there.get_outputs()[0].shape == [1, net.io.decoding.detections, 6]
    for image in range(2):
        (found,) = there.run(["detections"], {"input": x[image : image + 1].numpy()})
        same(found, wanted[image : image + 1])
    assert bool((wanted[..., 5] >= 0).any()) == (net.io.decoding.score_threshold < 0.99)


@pytest.mark.parametrize("coding", ["log_distance", "offset", "few"])
def test_openvino_gives_what_torch_detects(coding, tmp_path):
    openvino = pytest.importorskip("openvino")
    net, x = heads_of(coding)
    edgekd.export(net, target="intel-cpu", out=tmp_path)
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    there = openvino.Core().compile_model(tmp_path / "model.detections.onnx", "CPU", settings)
    wanted = detect(net.io.decoding, net(x))
    for image in range(2):
        same(there([x[image : image + 1].numpy()])[0], wanted[image : image + 1])


def test_boxes_are_those_before_the_suppression(bundle):
    folder, net, x = bundle
    boxes, scores = session(folder / "model.decoded.onnx").run(
        ["boxes", "scores"], {"input": x.numpy()}
    )
    plain = net.io.decoding.model_dump(mode="json")
    for image, raw in enumerate(zip(*(y.numpy() for y in net(x).values()), strict=True)):
        same(boxes[image], on_device.boxes_of(plain, raw[1]))
        same(scores[image], on_device.scores_of(plain, raw[0], *raw[2:]))


@pytest.mark.parametrize("coding", ["log_distance", "offset"])
def test_half_precision_moves_boxes_by_less_than_half_a_pixel(coding, tmp_path):
    levels = (Level(grid=(320 // s, 320 // s), stride=(s, s), sizes=((s, s),)) for s in (8, 16, 32))
    decoding = Decoding(image=(320, 320), levels=tuple(levels), **CODINGS[coding])
    widths = [K + decoding.background, 4 * max(decoding.bins, 1), 1][: 2 + decoding.quality]
    x = torch.randn(1, 2100, sum(widths), generator=torch.Generator().manual_seed(0))
    net = Network(Heads(widths, decoding), torch.zeros_like(x), decoding=decoding)
    model = to_onnx(net, Target.load("jetson-nano"))
    append_decoding(model, decoding)
    half, kept = to_half(model)
    assert kept == []
    whole, rounded = (
        ort.InferenceSession(ir.to_proto(each).SerializeToString()).run(None, {"input": x.numpy()})
        for each in (model, written_out(half))
    )
    assert 0 < np.abs(whole[0] - rounded[0]).max() < 0.5
    assert 0 < np.abs(whole[1] - rounded[1]).max() < 1e-3


def test_the_mean_of_a_distribution_is_a_distance():
    net, _ = heads_of("distance")
    plain = net.io.decoding
    coded = plain.model_copy(update={"boxes": "distribution", "bins": 8})
    raw = 3 * torch.randn(1, A, K + 4 * 8, generator=torch.Generator().manual_seed(1))
    means = raw[..., K:].unflatten(-1, (4, 8)).softmax(-1) @ torch.arange(8.0)
    whole = Network(Heads([K, 4 * 8], coded), torch.zeros(1, A, K + 4 * 8), decoding=coded)
    model = to_onnx(whole, Target.load("jetson-nano"))
    append_decoding(model, coded)
    there = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    boxes, _ = there.run(["boxes", "scores"], {"input": raw.numpy()})
    same(boxes[0], on_device.boxes_of(plain.model_dump(mode="json"), means[0].numpy()))


def test_what_no_file_can_decode_is_refused():
    net, _ = heads_of("distance")
    odd = net.io.decoding.model_copy(update={"boxes": "polar"})
    with pytest.raises(ModelError, match=r"cannot decode 'polar', only distance, .*: leave"):
        append_decoding(to_onnx(net, Target.load("jetson-nano")), odd)


def test_of_equal_scores_the_first_are_candidates(tmp_path):
    net, x = heads_of("few", detections=100, score_threshold=0.5)
    x = torch.cat([(2 * x[..., :K]).round() / 2, x[..., K:]], -1)
    edgekd.export(net, target="host-onnxruntime", out=tmp_path)
    there = session(tmp_path / "model.detections.onnx")
    for image in range(2):
        one = x[image : image + 1]
        raw = [y.numpy() for y in net(one).values()]
        wanted = on_device.detect(net.io.decoding.model_dump(mode="json"), raw)
        assert len(np.unique(wanted[:, 4])) < len(wanted)
        (found,) = there.run(["detections"], {"input": one.numpy()})
        found = found[0][found[0, :, 5] >= 0]
        order = [np.lexsort(rows.round(3).T) for rows in (found, wanted)]
        same(found[order[0]], wanted[order[1]])


def test_a_score_at_the_threshold_is_none(tmp_path):
    net, x = heads_of("distance", score_threshold=0.5)
    edgekd.export(net, target="host-onnxruntime", out=tmp_path)
    x = torch.cat([torch.zeros(1, A, K), x[:1, :, K:]], -1)
    (found,) = session(tmp_path / "model.detections.onnx").run(None, {"input": x.numpy()})
    assert (found == -1).all()


# ---- integers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [False, True], ids=["floats out", "integers out"])
def test_decoding_is_behind_the_dequantized_heads(ends, tmp_path):
    host = Target.load("host-onnxruntime")
    scheme = host.scheme.model_copy(update={"integer_inputs": ends, "integer_outputs": ends})
    host = host.model_copy(update={"scheme": scheme})
    images = torch.randn(8, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    net = Network(Core(), images[:1])
    net = edgekd.quantize(net, target=host, data=[(images, torch.zeros(8))])
    edgekd.export(net, target=host, out=tmp_path)
    model = onnx.load(tmp_path / "model.detections.onnx")
    integer = {e.name: e.type.tensor_type.elem_type for e in model.graph.input}
    assert (integer["input"] == TensorProto.UINT8) == ends
    kept = {p.key: p.value for p in model.metadata_props}
    assert set(json.loads(kept.get(KEY, "{}"))) == ({"input"} if ends else set())
    x = images[:1].numpy()
    raw, whole = (
        OrtSession((tmp_path / name).read_bytes(), 1, False, name)
        for name in ("model.onnx", "model.detections.onnx")
    )
    wanted = on_device.detect(net.io.decoding.model_dump(mode="json"), raw([x]))
    found = whole([x])[0][0]
    assert len(wanted) == net.io.decoding.detections
    np.testing.assert_allclose(found[:, 4], wanted[:, 4], rtol=1e-4)
    rows = {tuple(row) for row in found.round(2)}
    assert len(rows & {tuple(row) for row in wanted.round(2)}) >= 0.95 * len(wanted)


# ---- TensorRT ------------------------------------------------------------------------------------


def twin(path: Path) -> ort.InferenceSession:
    """The file with ONNX's NonMaxSuppression in the plugin's place, by the plugin's attributes."""
    model = onnx.load(path)
    (plugin,) = (n for n in model.graph.node if n.op_type == "EfficientNMS_TRT")
    model.graph.node.remove(plugin)
    said = {a.name: helper.get_attribute_value(a) for a in plugin.attribute}
    assert (plugin.domain, said["plugin_version"], said["background_class"]) == ("", b"1", -1)
    assert (said["box_coding"], said["score_activation"]) == (0, 0)
    shapes = {
        o.name: [d.dim_value for d in o.type.tensor_type.shape.dim] for o in model.graph.output
    }
    count = said["max_output_boxes"]
    assert list(shapes) == list(plugin.output) == [
        "num_detections", "detection_boxes", "detection_scores", "detection_classes",
    ]  # fmt: skip
    assert [s[1:] for s in shapes.values()] == [[1], [count, 4], [count], [count]]
    boxes, scores = plugin.input
    limits = {
        "count": np.array([count]),
        "iou": np.array([said["iou_threshold"]], np.float32),
        "score": np.array([said["score_threshold"]], np.float32),
    }
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in limits.items())
    model.graph.node.extend([
        helper.make_node("Transpose", [scores], ["turned"], perm=[0, 2, 1]),
        helper.make_node("NonMaxSuppression", [boxes, "turned", *limits], ["chosen"]),
    ])  # fmt: skip
    del model.graph.output[:]
    model.graph.output.extend([
        helper.make_tensor_value_info(boxes, TensorProto.FLOAT, ["batch", A, 4]),
        helper.make_tensor_value_info(scores, TensorProto.FLOAT, ["batch", A, K]),
        helper.make_tensor_value_info("chosen", TensorProto.INT64, ["found", 3]),
    ])  # fmt: skip
    onnx.checker.check_model(model, full_check=True)
    return ort.InferenceSession(model.SerializeToString())


@pytest.mark.parametrize(
    ("coding", "target"), [("log_distance", "jetson-xavier-nx"), ("offset", "jetson-orin-nano")]
)
def test_the_plugins_twin_gives_what_torch_detects(coding, target, tmp_path):
    net, x = heads_of(coding, candidates=A * K)
    edgekd.export(net, target=target, out=tmp_path)
    there = twin(tmp_path / "model.detections.onnx")
    wanted = detect(net.io.decoding, net(x))
    for image in range(2):
        boxes, scores, chosen = there.run(None, {"input": x[image : image + 1].numpy()})
        _, kind, anchor = chosen.T
        score = scores[0, anchor, kind]
        best = np.argsort(-score)[: net.io.decoding.detections]
        rows = np.concatenate([boxes[0, anchor], score[:, None], kind[:, None]], 1)[best]
        same(rows, wanted[image, : len(rows)])
        assert (wanted[image, len(rows) :] == -1).all()


def test_check_knows_the_plugin_where_the_table_has_it(tmp_path):
    net, _ = heads_of("offset")
    edgekd.export(net, target="jetson-orin-nano", out=tmp_path)
    path = tmp_path / "model.detections.onnx"
    (found,) = edgekd.check(path, target="jetson-orin-nano").findings
    assert (found.rule, found.severity) == ("plugin", "warning")
    assert "libnvinfer_plugin" in found.remedy
    (found,) = edgekd.check(path, target="jetson-nano").errors[1:]  # the first is the opset
    assert (found.rule, found.operator) == ("custom-operator", "EfficientNMS_TRT")
    assert not edgekd.check(path, target="host-onnxruntime").passed


def test_check_says_where_the_suppression_splits_the_graph(tmp_path):
    net, _ = heads_of("offset")
    edgekd.export(net, target="host-onnxruntime", out=tmp_path)
    check = edgekd.check(tmp_path / "model.detections.onnx", target="ios-coreml-ort")
    (found,) = (f for f in check.findings if f.operator == "NonMaxSuppression")
    assert (found.rule, found.severity) == ("operator", "warning")
    assert "the graph splits" in found.limit


@pytest.mark.parametrize("coding", ["log_distance", "offset"])
def test_the_nano_gets_boxes_but_no_plugin(coding, tmp_path):
    net, x = heads_of(coding)
    edgekd.export(net, target="jetson-nano", out=tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert list(manifest["variants"]) == ["model.decoded.onnx"]
    outputs = manifest["variants"]["model.decoded.onnx"]["outputs"]
    assert outputs == {"boxes": ["batch", A, 4], "scores": ["batch", A, K]}
    check = edgekd.check(tmp_path / "model.decoded.onnx", target="jetson-nano")
    assert (check.opset, check.findings) == (13, ())
    _, scores = session(tmp_path / "model.decoded.onnx").run(None, {"input": x.numpy()})
    assert 0 < scores.min() < scores.max() < 1


@pytest.mark.parametrize("coding", ["log_distance", "offset"])
def test_tensorrt_compiles_the_decoding(coding, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    net, _ = heads_of(coding)
    edgekd.export(net, target="jetson-orin-nano", out=tmp_path)
    target = Target.load("jetson-orin-nano")
    done = compile_check(tmp_path / "model.decoded.onnx", target, "fp16")
    assert done.error is None


def test_a_device_builds_a_variant_by_its_name(tmp_path):
    net, _ = heads_of("distance")
    edgekd.export(net, target="jetson-nano", out=tmp_path)
    (tmp_path / "trtexec").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "trtexec").chmod(0o755)
    ran = subprocess.run(
        ["sh", str(tmp_path / "build_engine.sh"), "model.decoded"], capture_output=True, text=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True,
    )  # fmt: skip
    assert {"--onnx=model.decoded.onnx", "--saveEngine=model.decoded.engine"} <= set(
        ran.stdout.split()
    )


# ---- C++ and infer.py ----------------------------------------------------------------------------


MAIN = r"""
#include <cstdio>
#include "detect.cc"
int main() {
  std::vector<float> SIZED;
  for (auto* each : {&classes, &boxes, &quality})
    if (std::fread(each->data(), 4, each->size(), stdin) != each->size()) return 1;
  for (const Detection& d : detect(classes.data(), boxes.data(), QUALITY))
    std::printf("%.9g %.9g %.9g %.9g %.9g %d\n", d.edges[0], d.edges[1], d.edges[2], d.edges[3],
                d.score, d.label);
}
"""


def compiled(folder: Path, shapes: list[tuple[int, ...]]) -> Path:
    """A program that reads the heads of one image and prints what detect.cc finds."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    sizes = [int(np.prod(shape)) for shape in shapes] + [0] * (3 - len(shapes))
    given = ["classes", "boxes", "quality"]
    (folder / "main.cc").write_text(
        MAIN.replace(
            "SIZED", ", ".join(f"{n}({s})" for n, s in zip(given, sizes, strict=True))
        ).replace("QUALITY", "quality.data()" if sizes[2] else "nullptr")
    )
    flags = ["-std=c++14", "-Wall", "-Wextra", "-pedantic", "-Werror"]
    subprocess.run(["g++", *flags, "main.cc", "-o", "found"], cwd=folder, check=True)
    return folder / "found"


def test_c_plus_plus_finds_what_torch_does(bundle):
    folder, net, x = bundle
    wanted = detect(net.io.decoding, net(x))
    raw = [y.numpy() for y in net(x).values()]
    program = compiled(folder, [y.shape[1:] for y in raw])
    for image in range(2):
        given = b"".join(np.ascontiguousarray(y[image]).tobytes() for y in raw)
        ran = subprocess.run([program], input=given, capture_output=True, check=True)
        rows = np.array(ran.stdout.split(), np.float32).reshape(-1, 6)
        same(rows, wanted[image, : len(rows)])
        assert (wanted[image, len(rows) :] == -1).all()


@pytest.mark.parametrize("target", ["host-onnxruntime", "intel-cpu"])
def test_infer_gives_the_same_boxes_from_either_file(target, tmp_path):
    known = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, fit="letterbox")
    net = Network(Core(), torch.zeros(1, 3, 64, 96), preprocessing=known)
    edgekd.export(net, target=target, out=tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")

    def boxes(*arguments: str) -> np.ndarray:
        command = [sys.executable, "-W", "error", "infer.py", "image.png", "--json", *arguments]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        return np.array(json.loads(ran.stdout)["boxes"])

    plain, whole = boxes("--score", "0"), boxes("--score", "0", "--file", "model.detections.onnx")
    assert len(plain) == 100
    np.testing.assert_allclose(whole, plain, rtol=1e-4, atol=1e-3)
    command = [sys.executable, "infer.py", "image.png", "--file", "model.decoded.onnx"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, "--file takes images" in ran.stderr) == (2, True)
