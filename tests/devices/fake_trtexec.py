"""What trtexec does as far as edgekd sees it, in the shapes that its versions write.

`fake_trtexec.py VERSION FLAG…`; it waits at "building" and "timing" while there is such a file with
".hold" beside the home folder's, and counts its calls in `calls`.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

BANNERS = {"8.2": "v8201", "8.5": "v8502", "10.3": "v100300"}
NAMES = ["Conv_0 + Relu_1", 'odd "name" \\x', "Gemm_2"]


def passing(stage: str, home: Path) -> None:
    with (home / "calls").open("a") as calls:
        calls.write(f"{stage}\n")
    (home / stage).touch()
    while (home / f"{stage}.hold").exists():
        time.sleep(0.02)


def times(count: int, version: str) -> list[dict[str, float]]:
    noise = random.Random(0)
    made = []
    for i in range(count):
        compute = 2.0 + noise.uniform(-0.01, 0.01)
        run = {"startEnqMs": 3.0 * i, "endEnqMs": 3.0 * i + 0.1, "h2dMs": 0.2,
               "computeMs": compute, "d2hMs": 0.1, "latencyMs": compute + 0.3,
               "endD2hMs": 3.0 * i + 2.5}  # fmt: skip
        made.append(run | ({"endToEndMs": compute + 1} if version == "8.2" else {}))
    return made


def profile(version: str) -> str:
    """Names as they are: trtexec does not escape them."""
    rows = ['  { "count" : 30 }']
    for name, ms in zip(NAMES, (1.2, 0.5, 0.2), strict=True):
        middle = "" if version == "8.2" else f'"medianMs" : {ms}, '
        figures = f'"timeMs" : {30 * ms}, "averageMs" : {ms}, {middle}"percentage" : 1'
        rows.append(f', {{ "name" : "{name}", {figures} }}')
    return "[\n" + "\n".join(rows) + "\n]\n"


def layers() -> str:
    rows = [
        f'{{"Name": "{name}","LayerType": "CaskConvolution","Inputs": [{{"Name": "x",'
        '"Format/Datatype": "Half"}],"Outputs": []}'
        for name in NAMES
    ]
    return '{"Layers": [' + ",\n".join(rows) + '],"Bindings": ["x"]}'


def main() -> None:
    version, *arguments = sys.argv[1:]
    home = Path(__file__).parent
    flags = dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments)
    print(f"&&&& RUNNING TensorRT.trtexec [TensorRT {BANNERS[version]}] # trtexec")
    if "onnx" in flags:
        passing("building", home)
        Path(flags["saveEngine"]).write_text(f"engine of {version}")
    elif "loadEngine" in flags:
        passing("timing", home)
        assert Path(flags["loadEngine"]).read_text() == f"engine of {version}"
        assert flags["duration"] == "0"
        print("[I] Engine loaded in 0.125 sec.")
        count = int(flags["iterations"])
        for flag, text in (
            ("exportTimes", json.dumps(times(count, version))),
            ("exportProfile", profile(version)),
            ("exportLayerInfo", layers()),
        ):
            if flag in flags:
                Path(flags[flag]).write_text(text)
    print("&&&& PASSED TensorRT.trtexec")


if __name__ == "__main__":
    main()
