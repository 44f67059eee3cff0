"""The page: everything in one file, nothing that runs, no text of a user's taken for HTML."""

from __future__ import annotations

import base64
import io
import json
import re
import xml.etree.ElementTree as ET
from functools import cache
from html.parser import HTMLParser

import numpy as np
import PIL.Image
import pytest
from matplotlib import rc_context
from rich.console import Console

from edgekd.choosing.choice import Choice, Price, Priced
from edgekd.choosing.members import Member
from edgekd.latency.layers import LayerTime
from edgekd.latency.measuring import Measurement
from edgekd.latency.model import Estimate
from edgekd.quantization.sensitivity import LayerEffect, Sensitivity
from edgekd.recipe import StudentSection
from edgekd.reporting.charts import curve_chart, jpeg, layer_chart, sample_chart
from edgekd.reporting.page import page
from edgekd.reporting.report import (
    ArtifactRow,
    BudgetRow,
    ControlRow,
    DataRow,
    Latency,
    Report,
    SampleRow,
    StageRow,
    TeacherRow,
)
from edgekd.runtimes.base import CompileCheck, TensorDifference
from edgekd.runtimes.local_parity import LocalParity, LocalPass, WholePass
from edgekd.tasks.base import Curves, Mark

HOSTILE = "<script>alert('x')</script> & \"$\\frac$\""
WORST = TensorDifference(tensor="conv", elements=100, unequal=40, mean_steps=3, max_steps=9)
VOID = {"meta", "img", "br"}


def stage(name: str, metric: float, **more: object) -> dict:
    values = {"name": name, "metric": metric, "metric_ci95": (metric - 0.01, metric + 0.01),
              "n": 1000, "params": 1000, "macs": 20_000}  # fmt: skip
    return values | more


def history(*losses: float) -> list[dict[str, float]]:
    return [
        {"step": 10 * epoch, "epoch": epoch, "supervised": loss, "teacher": 0.0}
        for epoch, loss in enumerate(losses, 1)
    ]


def artifact(**changes: object) -> ArtifactRow:
    values = {
        "target": "host", "precision": "fp32", "path": "runs/a/model.onnx", "size_bytes": 2048,
        "sha256": "abc", "verifier": "native", "metric": 0.89, "metric_ci95": (0.88, 0.9),
        "n": 1000, "agreement": 0.995, "max_steps": None, "mean_steps": None,
        "relative_error": 1e-6, "integer_share": None, "gate": "passed", "reasons": (),
        "local": None, "compiled": None, "latency_p50_ms": None,
        "measurement": None, "ships": True, "why": "the only one sound",
    }  # fmt: skip
    return ArtifactRow(**values | changes)


def report(**changes: object) -> Report:
    measured = Measurement(
        target="host", sha256="abc", p50_ms=0.5, p90_ms=0.6, p99_ms=0.7, clock="wall", runs=100,
        warm_up_runs=10, threads=1, load_ms=3.0, peak_memory_mib=None, runtime="onnxruntime",
        runtime_version="1", host="a host", instruction_set="avx2", date="2026-01-01",
        compared=(),
    )  # fmt: skip
    values = {
        "name": "tiny", "note": "", "metric_name": "top-1 accuracy", "passed": False, "seed": 7,
        "data": DataRow(name="things", fingerprint="f00", train=5000, test=1000,
                        classes=("cat", "dog", "bird")),
        "teacher": TeacherRow(
            **stage("teacher", 0.91, params=8000, metric_by_class=(0.9, 0.92, None),
                    history=history(2.0, 1.0)),
            latency=(Latency(target="host", latency_p50_ms=2.0),),
        ),
        "stages": (StageRow(**stage("student", 0.9, metric_by_class=(0.95, 0.7, None),
                                    history=history(1.5, 0.7))),),
        "artifacts": (
            artifact(latency_p50_ms=0.5, measurement=measured),
            artifact(target="phone", precision="int8", local=LocalParity(
                n=8, as_shipped=None, as_a_whole=WholePass(
                    elements=80, exact=0.75, within_one_step=1.0, mean_steps=0.25, max_steps=1.0,
                    unknown=("avg_pool2d",)), as_written=LocalPass(
                    tensors=4, of=5, elements=2000, exact=0.98, max_steps=9, worst=(WORST,),
                    first="relu (conv2d) is off", causes=(HOSTILE,)))),
            artifact(target="device", gate="failed", ships=False, why="", reasons=("too far off",),
                     compiled=CompileCheck(tool="compiler", version="1", capability="SM86",
                                           integer=3, total=4)),
        ),
        "controls": (ControlRow(**stage("without a teacher", 0.88, history=history(1.5, 0.7)),
                                against="student", difference=0.02,
                                difference_ci95=(-0.001, 0.041)),),
        "host": "a host", "versions": {"torch": "9"}, "path": "runs/tiny/report/report.json",
    }  # fmt: skip
    return Report(**values | changes)


class Page(HTMLParser):
    """Balanced tags, their text and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_it_needs_nothing_else():
    text = seen_page()
    parsed = Page(text)
    assert not parsed.all("script") and not parsed.all("link") and not parsed.all("iframe")
    kinds = [image["src"].partition(",")[0] for image in parsed.all("img")]
    assert set(kinds) == {"data:image/svg+xml;base64", "data:image/jpeg;base64"}
    assert all(image["alt"] for image in parsed.all("img"))
    assert "http" not in text and "url(" not in text and "@import" not in text


def test_each_operator_by_itself_is_under_parity():
    parity = Page(page(report())).text.partition("Parity")[2]
    assert "as written 98.0000 / 9" in parity
    assert "98.00000% of 2,000 elements exact, largest difference 9 steps, 4 of 5 tensors" in parity
    assert f"; {HOSTILE}" in parity
    assert "conv : 40 of 100 elements differ, 9 steps at most" in parity
    assert "as a whole, in the runtime's integers, 8 samples: 75.000% of 80 outputs" in parity
    assert "as real numbers, rounded once: avg_pool2d" in parity


def test_the_answer_comes_first():
    parsed = Page(page(report()))
    first = parsed.text.partition("Accuracy and size by stage")[0]
    assert "NOT all gates passed" in first
    assert "8.0× fewer parameters" in first
    assert "host: ship fp32" in first and "runs/a/model.onnx" in first
    assert "89.00 (88.00–90.00) , -2.00 points beside the teacher" in first
    assert "p50 0.500 ms (wall, 1 thread), 4.0× the speed" in first
    assert "device: nothing to ship" in first


def test_every_part_is_there():
    text = Page(page(report())).text
    assert "without a teacher" in text and "+2.00 (-0.10 to +4.10)" in text
    by_class = text.partition("By class")[2]
    assert by_class.index("dog") < by_class.index("cat")  # what lost most comes first
    assert "70.0 (-22.0)" in by_class and "95.0 (+5.0)" in by_class and "no images" in by_class
    assert "too far off" in text
    assert "compiled by compiler 1 for SM86, not on the device; 3 of 4 matrix operators" in text
    for fact in ("a host", "fingerprint f00", "torch 9", "seed 7", "wall clock", "avx2"):
        assert fact in text


def charts(parsed: Page) -> dict[str, str]:
    return {
        image["alt"]: base64.b64decode(image["src"].partition(",")[2]).decode()
        for image in parsed.all("img")
        if image["src"].startswith("data:image/svg+xml")
    }


def test_charts_are_whole_and_each_training_is_drawn_once():
    drawn = charts(Page(page(report())))
    assert list(drawn) == [
        "metric, parameters and MACs of each network", "p50 latency on host",
        "top-1 accuracy against p50 latency on host", "loss of teacher by epoch",
        "loss of student by epoch",
    ]  # fmt: skip
    for svg in drawn.values():
        assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert "fp32 (ships)" in drawn["p50 latency on host"]
    against = words(drawn["top-1 accuracy against p50 latency on host"])
    assert against[-2:] == ["teacher fp32", "student fp32 (ships)"]
    assert {"p50 latency, ms", "top-1 accuracy, %", "0.5", "1", "2"} <= set(against)


def words(svg: str) -> list[str]:
    return [text.text or "" for text in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def layered(count: int, rest_ms: float) -> ArtifactRow:
    """The n-th of `count` layers takes n ms."""
    total = count * (count + 1) / 2
    measured = report().artifacts[0].measurement
    assert measured is not None
    times = tuple(
        LayerTime(name=f"{HOSTILE}/layer {n}", operator="Conv", p50_ms=n, share=n / total)
        for n in range(1, count + 1)
    )
    return artifact(
        latency_p50_ms=200.0,
        measurement=measured.model_copy(
            update={"layers": times, "p50_ms": 200.0, "rest_ms": rest_ms, "rest": "so much is left"}
        ),
    )


@pytest.mark.parametrize(
    ("count", "rest_ms", "others"),
    [
        (19, 10.5, [("4 other layers", "10.000 · 5%"), ("outside the layers", "10.500 · 5%")]),
        (3, -1.0, []),
    ],
)
def test_the_slowest_layers_are_drawn_by_time(count, rest_ms, others):
    measured = layered(count, rest_ms).measurement
    assert measured is not None
    (axes,) = layer_chart(measured).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    slowest = range(count, max(0, count - 15), -1)
    assert [name.rpartition("/")[2] for name in names] == [
        *(f"layer {n}" for n in slowest), *(name for name, _ in others)
    ]  # fmt: skip
    assert all(len(name) <= 40 for name in names)
    assert [text.get_text() for text in axes.texts] == [
        *(f"{n}.000 · {n / 2:.0f}% · Conv" for n in slowest), *(said for _, said in others)
    ]  # fmt: skip
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [*slowest, *(float(said.partition(" ")[0]) for _, said in others)]


def test_layers_are_said_to_be_measured_here():
    parsed = Page(page(report(artifacts=(layered(3, 1.0),))))
    assert "slowest layers of fp32 on host" in charts(parsed)
    said = "Of 200.000 ms: 3 layers, timed by onnxruntime 1 in a pass of their own, "
    assert f"{said}measured here, on a host; so much is left." in parsed.text


def test_a_device_and_an_import_are_called_so():
    over = layered(1, 0.0).measurement
    assert over is not None
    over = over.model_copy(update={"origin": "device", "host": "a board", "device": "ssh://b"})
    assert (
        artifact(latency_p50_ms=1.0, measurement=over).where == "measured on a board, over ssh://b"
    )
    text = Page(page(report(artifacts=(artifact(latency_p50_ms=1.0),)))).text
    assert "Imported from a measurement on the device." in text
    assert "measured here" not in text


# ---- what networks say ---------------------------------------------------------------------------


def curves(*lines: tuple[float, ...] | None) -> Curves:
    return Curves(x_name="recall", y_name="precision", x=(0.0, 0.5, 1.0), by_class=lines)


def sample(shape: tuple[int, int, int] = (3, 48, 64), boxed: bool = True) -> SampleRow:
    """Noise, which no picture is harder to compress than."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    box = (2.0, 3.0, 30.0, 40.0) if boxed else None
    truth = (Mark(label=0, box=box),)
    said = (Mark(label=0, score=0.87, box=box), Mark(label=7, score=0.4, box=box))
    names = ("teacher", "student fp32", HOSTILE)
    return SampleRow.of(pixels, {"truth": truth} | dict.fromkeys(names, said))


def seen(**changes: object) -> Report:
    good, bad = (1.0, 1.0, 0.5), (1.0, 0.4, 0.0)
    values = {
        "curves": {"teacher": curves(good, good, None), "student fp32": curves(good, bad, None)},
        "samples": (sample(), sample((1, 12, 12), boxed=False)),
    }
    return report(**values | changes)


@cache
def seen_page() -> str:
    return page(seen())


def test_what_networks_say_is_on_the_page():
    parsed = Page(seen_page())
    assert "Precision over recall" in parsed.text and "Test images" in parsed.text
    drawn = words(charts(parsed)["precision over recall of teacher, student fp32"])
    assert {"recall", "precision", "dog", "46.7 student fp32"} <= set(drawn)
    pictures = [i["alt"] for i in parsed.all("img") if i["src"].startswith("data:image/jpeg")]
    assert pictures == [
        f"test image {n}: truth, teacher, student fp32, {HOSTILE}" for n in (1, 2)
    ]  # fmt: skip


def test_curves_have_a_panel_for_each_class_the_worst_loss_first():
    shown = seen()
    figure = curve_chart(shown.curves, shown.data.classes)
    said = {
        axes.get_title(): [text.get_text() for text in axes.get_legend().get_texts()]
        for axes in figure.axes
    }
    assert list(said.items()) == [
        ("mean of 2 classes", ["83.3 teacher", "65.0 student fp32"]),
        ("dog", ["83.3 teacher", "46.7 student fp32"]),
        ("cat", ["83.3 teacher", "83.3 student fp32"]),
    ]
    for line, wanted in zip(figure.axes[0].lines, ((1, 1, 0.5), (1, 0.7, 0.25)), strict=True):
        np.testing.assert_allclose(line.get_xydata(), np.transpose([(0, 0.5, 1), wanted]))
    many = curves(*[(1.0, 1.0, 0.0)] * 40)
    crowded = curve_chart({"teacher": many}, tuple(map(str, range(40))))
    assert sum(bool(axes.lines) for axes in crowded.axes) == 8


@pytest.mark.parametrize("shape", [(3, 320, 320), (3, 90, 640), (1, 12, 12)])
def test_an_image_becomes_a_small_picture(shape):
    with rc_context({"text.parse_math": False}):  # as the page does
        url = jpeg(sample_chart(sample(shape, boxed=shape[0] == 3), ("cat",)))
    assert url.startswith("data:image/jpeg;base64,") and len(url) < 150_000
    width, height = PIL.Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size
    assert 1.5 * height < width <= 1300 and height <= 420


def test_boxes_are_where_they_are_said_to_be():
    """The truth's dashed edge, and the label of the surest one, in the colour of the class."""
    black = SampleRow.of(
        np.zeros((3, 100, 100), np.uint8),
        {"truth": (), "net": (Mark(label=0, score=0.9, box=(20, 40, 60, 80)),)},
    )
    figure = sample_chart(black, ("cat",))
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=100)
    pixels = np.asarray(PIL.Image.open(raw).convert("RGB")).astype(int)
    blue = (np.abs(pixels - (0x42, 0x69, 0xD0)).max(-1) < 12)[: int(0.9 * len(pixels))]
    panels = [axes.get_window_extent() for axes in figure.axes]
    rows, columns = blue.nonzero()
    side, left = panels[1].width, panels[1].x0
    top = len(pixels) - panels[1].y1
    found = (columns.min() - left, rows.min() - top, columns.max() - left, rows.max() - top)
    np.testing.assert_allclose(np.array(found) / side, (0.2, 0.4, 0.6, 0.8), atol=0.02)


def test_a_report_of_before_has_less_on_its_page():
    old = json.loads(seen().model_dump_json()) | {"schema_version": 4}
    del old["curves"], old["samples"]
    text = Page(page(Report.model_validate(old))).text
    assert "Precision over recall" not in text and "Test images" not in text
    assert Report.model_validate_json(seen().model_dump_json()) == seen()


def test_the_same_report_gives_the_same_bytes():
    assert page(seen()) == seen_page()


def mixed(layer: str, **changes: object) -> StageRow:
    rows = (
        LayerEffect(layer=layer, sqnr_gain_db=17.25, metric_gain=0.031, price=3000, in_float=True),
        LayerEffect(layer="head", sqnr_gain_db=-0.5, metric_gain=0.0, price=1000),
    )
    values = {
        "metric_name": "top-1 accuracy", "split": "val", "n": 1024, "n_layers": 256,
        "sqnr_db": 9.5, "integer_drop": 0.04, "drop": 0.002, "max_drop": 0.005,
        "price_unit": "MACs", "layers": rows,
    }  # fmt: skip
    table = Sensitivity.model_validate(values | changes)
    return StageRow(**stage("quantized", 0.9, sensitivity=table))


def test_the_table_of_layers_says_what_stays_in_float():
    text = Page(page(report(stages=(mixed("stem.0"),)))).text
    part = text.partition("Mixed precision: quantized")[2].partition("By class")[0]
    assert "In float stay stem.0 (1 of 2 layers, 75.0% of their MACs)" in part
    assert "drops by 0.20 points, not by 4.00, on 1,024 samples of val (allowed: 0.5)." in part
    assert "stem.0 +17.25 +3.10 3,000 yes head -0.50 +0.00 1,000" in part
    assert "9.5 dB" in part and "on 256 samples" in part
    assert "MACs, not time: the target has no latency table" in part
    timed = Page(page(report(stages=(mixed("stem.0", price_unit="ms"),)))).text
    assert "price, estimated ms" in timed and "3000.000" in timed
    assert "Prices are estimates: how much longer the layer takes in float" in timed
    assert "(1 of 2 layers, 3e+03 ms slower than integers, estimated)" in timed
    assert "MACs, not time" not in timed


def test_the_terminal_says_what_stays_in_float():
    written = io.StringIO()
    report(stages=(mixed("stem.0"),)).print(Console(file=written, width=300))
    assert "quantized: in float stay stem.0 (1 of 2 layers" in written.getvalue()


def test_a_table_of_layers_is_read_again():
    given = report(stages=(mixed(HOSTILE),))
    assert Report.model_validate_json(given.model_dump_json()) == given
    assert HOSTILE in Page(page(given)).text


def test_without_what_is_optional_it_says_less():
    bare = report(
        controls=(), artifacts=(artifact(),), passed=True,
        teacher=TeacherRow(**stage("teacher", 0.9), latency=()),
        stages=(StageRow(**stage("student", 0.9)),),
    )  # fmt: skip
    text = Page(page(bare)).text
    for part in (
        "What each stage is worth",
        "By class",
        "Training curves",
        "NOT",
        "Mixed precision",
    ):
        assert part not in text
    assert "No target of this run is this host" in text
    assert "latency not measured: this host is not that device" in text


def test_many_classes_are_cut_and_the_page_says_so():
    names = tuple(f"class {i}" for i in range(100))
    shares = tuple(i / 100 for i in range(100))
    many = report(
        data=DataRow(name="things", fingerprint="", train=1, test=1, classes=names),
        teacher=TeacherRow(**stage("teacher", 0.9, metric_by_class=(0.9,) * 100), latency=()),
        stages=(StageRow(**stage("student", 0.9, metric_by_class=shares)),),
    )  # fmt: skip
    text = Page(page(many)).text
    assert "30 of 100 classes" in text and "class 29 " in text and "class 30 " not in text


@pytest.mark.parametrize("name", ["name", "note", "host"])
def test_a_users_text_is_text(name):
    assert HOSTILE in Page(page(report(**{name: HOSTILE}))).text


def test_text_inside_rows_and_charts_is_text():
    hostile = report(
        artifacts=(
            artifact(target=HOSTILE, reasons=(HOSTILE,), gate="failed", latency_p50_ms=1.0),
        ),
        teacher=TeacherRow(
            **stage(HOSTILE, 0.9, metric_by_class=(0.5,), note=HOSTILE,
                    history=[{"epoch": 1, "step": 1, HOSTILE: 0.5}]),
            latency=(Latency(target=HOSTILE, latency_p50_ms=1.0),),
        ),
        data=DataRow(name=HOSTILE, fingerprint=HOSTILE, train=1, test=1, classes=(HOSTILE,)),
        versions={HOSTILE: HOSTILE},
        curves={HOSTILE: curves((1.0, 0.5, 0.0))},
        samples=(sample(), sample(boxed=False)),
    )  # fmt: skip
    parsed = Page(page(hostile))
    assert not parsed.all("script")
    assert parsed.text.count("alert('x')") > 8
    drawn = [image for image in parsed.all("img") if "data:image/svg" in image["src"]]
    assert len(parsed.all("img")) == len(drawn) + 2
    for image in drawn:
        svg = base64.b64decode(image["src"].partition(",")[2]).decode()
        assert not ET.fromstring(svg).findall(".//{*}script")
    assert HOSTILE in words(charts(parsed)[f"precision over recall of {HOSTILE}"])


def test_a_budget_and_the_members_beside_the_chosen_one():
    estimate = Estimate(p50_ms=0.45, low_ms=0.4, high_ms=0.5, method="model", basis="test")

    def priced(name: str, measured_ms: float | None = None) -> Priced:
        section = StudentSection(model="edgekd/resnet")
        member = Member(name=name, section=section, params=1000, macs=2000)
        price = Price(
            target="host", precision="int8", estimate=estimate, measured_ms=measured_ms
        )  # fmt: skip
        return Priced(member=member, prices=(price,))

    chosen = priced("<medium>", 0.48)
    choice = Choice(
        chosen=chosen, budget_ms={"host": 0.6}, rounds=(priced("member-a", 0.7), chosen),
        left_out=(priced("member-c"), priced("member-a")), considered=40,
    )  # fmt: skip
    budgets = [
        BudgetRow(target="host", budget_ms=0.6, estimate=estimate, measured_ms=took,
                  within_budget=None if took is None else took <= 0.6)
        for took in (0.5, 0.7, None)
    ]  # fmt: skip
    text = Page(page(report(choice=choice, budgets=budgets[:1]))).text
    assert "measured 0.5 ms: kept, 83% of it" in text
    rows = text.partition("The student")[2].partition("Accuracy and size")[0]
    assert [rows.index(name) for name in ("<medium>", "member-a", "member-c")] == sorted(
        rows.index(name) for name in ("<medium>", "member-a", "member-c")
    )
    assert rows.count("member-a") == 1 and "measured 0.7 ms" in rows
    assert "MISSED, 117% of it" in budgets[1].summary
    assert "not measured: run `python measure.py`" in budgets[2].summary
