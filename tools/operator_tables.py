"""Ask ONNX Runtime and OpenVINO which operators they take; write their tables.

    python tools/operator_tables.py [onnxruntime] [openvino]

ONNX Runtime lists its CPU kernels; operators that ONNX defines as functions are taken apart.
OpenVINO lists nothing: each operator of ONNX is put before its frontend by itself, and what it has
no rule for, it names. The tables of TensorRT and Core ML are copied from their documents.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

RUNTIMES = Path(__file__).parent.parent / "edgekd" / "runtimes"
# C++ names of tensor types -> ONNX's
NAMES = {"float": "FLOAT", "double": "DOUBLE", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}


def onnxruntime_table() -> dict[str, Any]:
    """Kernels of the CPU provider, and functions."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    operators: dict[str, set[str]] = {}
    for kernel in native.get_all_opkernel_def():
        if kernel.domain in ("", "com.microsoft", "ai.onnx.ml"):
            name = f"{kernel.domain}:{kernel.op_name}" if kernel.domain else kernel.op_name
            types = operators.setdefault(name, set())
            for allowed in kernel.type_constraints.values():
                for text in allowed:
                    if found := re.fullmatch(r"tensor\((\w+)\)", text):
                        types.add(NAMES.get(found[1], found[1].upper()))
    for schema in onnx.defs.get_all_schemas():
        if schema.domain == "" and (schema.has_function or schema.has_context_dependent_function):
            operators.setdefault(schema.name, set())
    operators["Constant"] = set()
    version = ".".join(onnxruntime.__version__.split(".")[:2])
    facts = {
        "url": "https://onnxruntime.ai/docs/reference/operators/OperatorKernels.html",
        "max_opset": _newest(lambda n: _opens(opset=n)),
        "max_ir_version": _newest(lambda n: _opens(ir_version=n)),
        "read_as": {"FLOAT16": "FLOAT"},  # a Cast goes in front of what has no kernel
        "operators": {name: sorted(types) for name, types in sorted(operators.items())},
    }
    source = f"kernels of onnxruntime {onnxruntime.__version__}'s CPU provider, by themselves"
    return {"source": source, "versions": {version: facts}}


def openvino_table() -> dict[str, Any]:
    """What the ONNX frontend has a rule for; it converts between element types as it needs."""
    import openvino
    from openvino.frontend import FrontEndManager

    frontend = FrontEndManager().load_by_framework("onnx")
    operators = []
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted({s.name for s in onnx.defs.get_all_schemas() if s.domain == ""}):
            path = f"{folder}/model.onnx"
            onnx.save(_one(name, onnx.defs.onnx_opset_version()), path)
            try:
                frontend.convert(frontend.load(path))
            except Exception as error:  # openvino's own types share no base but this
                if f"No conversion rule found for operations: {name}" in str(error):
                    continue
            operators.append(name)
    version = ".".join(openvino.__version__.split(".")[:2])
    facts = {
        "url": "https://github.com/openvinotoolkit/openvino/blob/master/src/frontends/onnx/docs/"
        "supported_ops.md",
        "operators": {name: [] for name in operators},
    }
    source = f"openvino {openvino.__version__.split('-')[0]}'s ONNX frontend, asked one by one"
    return {"source": source, "versions": {version: facts}}


def _one(op_type: str, opset: int, ir_version: int = 8) -> onnx.ModelProto:
    """A model of that operator alone, with as few inputs as it takes."""
    schema = onnx.defs.get_schema(op_type, opset, "")
    inputs = [f"x{i}" for i in range(max(schema.min_input, 1))]
    outputs = [f"y{i}" for i in range(max(schema.min_output, 1))]
    graph = helper.make_graph(
        [helper.make_node(op_type, inputs, outputs)], op_type,
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 4, 4]) for n in inputs],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
    )  # fmt: skip
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
    )


def _opens(opset: int = 13, ir_version: int = 8) -> bool:
    import onnxruntime

    model = _one("Relu", opset, ir_version)
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime's own types share no base but this
        return False
    return True


def _newest(opens: Any) -> int:
    return max(n for n in range(8, 60) if opens(n))


def write(table: dict[str, Any], path: Path) -> None:
    """Lists in one line each."""
    text = json.dumps(table, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda m: " ".join(m[0].split()), text)
    path.write_text(re.sub(r"\[ | \]", lambda m: m[0].strip(), text) + "\n")


TABLES = {"onnxruntime": onnxruntime_table, "openvino": openvino_table}

if __name__ == "__main__":
    for chosen in sys.argv[1:] or TABLES:
        write(TABLES[chosen](), RUNTIMES / f"{chosen}_operators.json")
