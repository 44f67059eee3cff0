#!/usr/bin/env python3
"""Run this bundle's model on the device: `infer.py IMAGE...`, or `infer.py --check`.

It needs Python 3.6, NumPy, the runtime that manifest.json names and, for images, Pillow.
`--check` runs the inputs in check.npz and compares with the outputs that the trained network gave;
it prints one line of JSON and exits with 1 where they differ. With ONNX Runtime and OpenVINO,
`--file model.detections.onnx IMAGE...` takes a detector's boxes from that file, not from detect.py.
"""

import argparse
import ctypes
import json
import os
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))


# Each of these opens a model and gives a function from its inputs' arrays to its outputs', and of
# each input the shape, batch 1, and NumPy's name of its type.


def onnxruntime_session(path, manifest, threads=None, profile=None):
    """Settings as edgekd/runtimes/onnxruntime.py has them; `profile`: a prefix for its file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    wanted = [*manifest["providers"], "CPUExecutionProvider"]
    there = onnxruntime.get_available_providers()
    return onnxruntime.InferenceSession(path, options, providers=[p for p in wanted if p in there])


def with_onnxruntime(path, manifest, threads=None):
    return of_session(onnxruntime_session(path, manifest, threads))


def of_session(session):
    inputs = session.get_inputs()
    names = [value.name for value in inputs]
    types = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}
    ends = [
        (one_sample(i.name, i.shape), types.get(i.type, i.type[len("tensor(") : -1]))
        for i in inputs
    ]
    return lambda arrays: session.run(None, dict(zip(names, arrays))), ends


def openvino_model(path, manifest, threads=None, profile=False):
    """Settings as edgekd/runtimes/openvino.py has them."""
    import openvino

    device = manifest["device"]
    settings = {"PERFORMANCE_HINT": "LATENCY"}
    if device == "CPU":  # one with AMX would compute in bfloat16
        settings["INFERENCE_PRECISION_HINT"] = "f32"
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
    if profile:
        settings["PERF_COUNT"] = True
    return openvino.Core().compile_model(path, device, settings)


def with_openvino(path, manifest, threads=None):
    return of_compiled(openvino_model(path, manifest, threads))


def of_compiled(compiled):
    shapes = [[d.get_length() if d.is_static else None for d in i.partial_shape]
              for i in compiled.inputs]  # fmt: skip
    ends = [
        (one_sample(i.any_name, shape), np.dtype(i.element_type.to_dtype()).name)
        for i, shape in zip(compiled.inputs, shapes)
    ]

    def run(arrays):
        results = compiled(arrays, share_inputs=True)
        return [results[output] for output in compiled.outputs]

    return run, ends


def with_litert(path, manifest, threads=None):
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        from tflite_runtime.interpreter import Interpreter
    interpreter = Interpreter(path, num_threads=threads)
    interpreter.allocate_tensors()
    details = interpreter.get_input_details()
    outputs = [d["index"] for d in interpreter.get_output_details()]

    def run(arrays):
        for value, detail in zip(arrays, details):
            interpreter.set_tensor(detail["index"], value)
        interpreter.invoke()
        return [interpreter.get_tensor(index) for index in outputs]

    return run, [(tuple(map(int, d["shape"])), np.dtype(d["dtype"]).name) for d in details]


def with_executorch(path, manifest, threads=None):
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    if threads is not None:
        portable_lib._unsafe_reset_threadpool(threads)
    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    inputs = [method.metadata.input_tensor_meta(i) for i in range(method.metadata.num_inputs())]
    types = {0: "uint8", 1: "int8", 6: "float32"}  # torch's numbers of them

    def run(arrays, program=program):  # the method is read from the program's memory
        return [y.numpy() for y in method.execute([torch.from_numpy(x) for x in arrays])]

    return run, [(tuple(i.sizes()), types[i.dtype()]) for i in inputs]


def one_sample(name, shape):
    """The shape of batch 1; only the batch may be open."""
    if any(not isinstance(size, int) for size in shape[1:]):
        raise SystemExit("input {} leaves its size open: {}; fix it".format(name, shape))
    return (shape[0] if isinstance(shape[0], int) else 1, *shape[1:])


def with_tensorrt(path, manifest, threads=None):
    """The engine that build_engine.sh made; buffers through the CUDA runtime, without PyCUDA."""
    import tensorrt

    engine_path = os.path.splitext(path)[0] + ".engine"
    if not os.path.exists(engine_path):
        raise SystemExit("no {}: run build_engine.sh first".format(engine_path))
    cuda = ctypes.CDLL("libcudart.so")

    def call(name, *arguments):
        code = getattr(cuda, name)(*arguments)
        if code:
            raise RuntimeError("{} failed with CUDA error {}".format(name, code))

    with open(engine_path, "rb") as file:
        runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
        engine = runtime.deserialize_cuda_engine(file.read())
    if engine is None:
        raise SystemExit("this TensorRT did not build {}: build it here".format(engine_path))
    context = engine.create_execution_context()
    by_name = hasattr(engine, "num_io_tensors")  # from 8.5 on
    count = engine.num_io_tensors if by_name else engine.num_bindings
    names = [engine.get_tensor_name(i) if by_name else engine.get_binding_name(i)
             for i in range(count)]  # fmt: skip

    def run(inputs):
        arrays = dict(zip((i["name"] for i in manifest["io"]["inputs"]), inputs))
        for index, name in enumerate(names):
            if name in arrays:
                if by_name:
                    context.set_input_shape(name, arrays[name].shape)
                else:
                    context.set_binding_shape(index, arrays[name].shape)
        pointers = []
        for index, name in enumerate(names):
            if name not in arrays:
                shape = (context.get_tensor_shape(name) if by_name
                         else context.get_binding_shape(index))  # fmt: skip
                arrays[name] = np.zeros(tuple(shape), np.float32)
            pointer = ctypes.c_void_p()
            array = arrays[name] = np.ascontiguousarray(arrays[name])
            call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(array.nbytes))
            pointers.append(pointer)
            call("cudaMemcpy", pointer, array.ctypes.data_as(ctypes.c_void_p),
                 ctypes.c_size_t(array.nbytes), 1)  # fmt: skip
        if not context.execute_v2([pointer.value for pointer in pointers]):
            raise RuntimeError("TensorRT could not run the engine")
        for name, pointer in zip(names, pointers):
            array = arrays[name]
            call("cudaMemcpy", array.ctypes.data_as(ctypes.c_void_p), pointer,
                 ctypes.c_size_t(array.nbytes), 2)  # fmt: skip
            call("cudaFree", pointer)
        return [arrays[name] for name in manifest["io"]["outputs"]]

    return run, [((1, *i["shape"]), i["dtype"]) for i in manifest["io"]["inputs"]]


RUNTIMES = {
    "executorch": with_executorch,
    "litert": with_litert,
    "onnxruntime": with_onnxruntime,
    "openvino": with_openvino,
    "tensorrt": with_tensorrt,
}


def load_model(manifest, file=None):
    """A function from a list of float arrays (N, C, H, W) to the list of float outputs.

    N is 1, but for ONNX Runtime's files with an open batch.
    """
    run, _ = RUNTIMES[manifest["runtime"]](os.path.join(HERE, file or manifest["file"]), manifest)
    names = manifest["variants"][file]["outputs"] if file else manifest["io"]["outputs"]
    integers = manifest["integers"]
    inputs = [integers.get(i["name"]) for i in manifest["io"]["inputs"]]
    outputs = [integers.get(name) for name in names]

    def quantize(x, end):
        if end is None:
            return x
        limits = np.iinfo(end["dtype"])
        steps = np.rint(x / np.float32(end["scale"])) + end["zero_point"]
        return steps.clip(limits.min, limits.max).astype(end["dtype"])

    def dequantize(y, end):
        if end is None:
            return y
        return (y.astype(np.float32) - end["zero_point"]) * np.float32(end["scale"])

    def model(arrays):
        if manifest["layout"] == "NHWC":
            arrays = [np.ascontiguousarray(x.transpose(0, 2, 3, 1)) for x in arrays]
        results = run([quantize(x, end) for x, end in zip(arrays, inputs)])
        return [dequantize(np.asarray(y), end) for y, end in zip(results, outputs)]

    return model


def read_image(path, manifest):
    """The input (1, C, H, W) of an image: cropped and resized as in evaluation, normalised."""
    from PIL import Image, ImageOps

    channels, height, width = manifest["io"]["inputs"][0]["shape"]
    known = manifest["io"]["preprocessing"]
    image = Image.open(path).convert("L" if channels == 1 else "RGB")
    if known is not None and known["fit"] == "letterbox":
        from detect import letterbox

        pixels = np.asarray(image).reshape(image.height, image.width, channels)
        image = letterbox(pixels, height, width)
    elif image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.BILINEAR)
    x = np.asarray(image, np.float32).reshape(height, width, channels).transpose(2, 0, 1)[None]
    if known is None:
        return x
    mean, std = (np.array(known[k], np.float32).reshape(1, -1, 1, 1) for k in ("mean", "std"))
    return (x / np.float32(255) - mean) / std


def boxes(path, model, manifest, decoded=False):
    """(D, 6) detections in pixels of the image: left, top, right, bottom, score, class.

    decoded: the model gives them itself, in pixels of its input.
    """
    from detect import detect, to_original
    from PIL import Image

    decoding, outputs = manifest["io"]["decoding"], model([read_image(path, manifest)])
    found = outputs[0][0] if decoded else detect(decoding, outputs)
    found = found[found[:, 4] >= 0]
    with Image.open(path) as image:
        return to_original(found, image.height, image.width, decoding)


def check(model, manifest):
    """Compare with the outputs in check.npz: each may be off by its tolerance in the mean."""
    kept = np.load(os.path.join(HERE, "check.npz"))
    count = len(kept[manifest["io"]["inputs"][0]["name"]])
    passed, differences = True, {}
    for index in range(count):
        given = [kept[i["name"]][index : index + 1] for i in manifest["io"]["inputs"]]
        for name, found in zip(manifest["io"]["outputs"], model(given)):
            off = np.abs(found - kept[name][index : index + 1])
            mean = float(off.mean())
            passed = passed and mean <= manifest["check"]["tolerance"][name]
            worst = differences.setdefault(name, [0.0, 0.0])
            differences[name] = [max(worst[0], mean), max(worst[1], float(off.max()))]
    print(json.dumps({
        "target": manifest["target"], "file": manifest["file"], "inputs": count, "passed": passed,
        "largest_mean_difference": {n: d[0] for n, d in differences.items()},
        "largest_difference": {n: d[1] for n, d in differences.items()},
        "tolerance": manifest["check"]["tolerance"],
    }))  # fmt: skip
    return passed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("images", nargs="*", help="image files")
    parser.add_argument("--check", action="store_true", help="compare with what was trained")
    parser.add_argument("--top", type=int, default=5, help="answers to print of each image")
    parser.add_argument("--score", type=float, default=0.3, help="least score of a detection")
    parser.add_argument("--json", action="store_true", help="a detector's boxes as lines of JSON")
    parser.add_argument("--file", help="one that gives detections: model.detections.onnx")
    options = parser.parse_args()
    if not options.images and not options.check:
        parser.error("name an image, or --check")
    with open(os.path.join(HERE, "manifest.json")) as file:
        manifest = json.load(file)
    if options.file:
        known = manifest["variants"].get(options.file, {}).get("outputs", {})
        if options.check or list(known) != ["detections"]:
            parser.error("--file takes images, and a file whose output in manifest.json is "
                         "`detections`")  # fmt: skip
    model = load_model(manifest, options.file)
    if options.check and not check(model, manifest):
        sys.exit(1)
    labels = manifest["io"]["labels"]
    for path in options.images:
        if manifest["io"]["decoding"] is not None:
            found = boxes(path, model, manifest, bool(options.file))
            shown = [row for row in found.tolist() if row[4] >= options.score]
            if options.json:
                print(json.dumps({"image": path, "boxes": shown}))
                continue
            print("{}: {} boxes".format(path, len(shown)))
            for row in shown:
                kind = int(row[5])
                edges = " ".join("{:.1f}".format(edge) for edge in row[:4])
                print("  {} {:.4f} {}".format(labels[kind] if labels else kind, row[4], edges))
            continue
        scores = model([read_image(path, manifest)])[0].reshape(-1)
        best = scores.argsort()[::-1][: options.top]
        said = ["{} {:.4f}".format(labels[i] if labels else i, scores[i]) for i in best]
        print("{}: {}".format(path, ", ".join(said)))


if __name__ == "__main__":
    main()
