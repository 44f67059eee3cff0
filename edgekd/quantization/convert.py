"""From the trained fake-quantized graph to quantize and dequantize operators."""

from __future__ import annotations

import copy

import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from edgekd.quantization.capture import arguments, tensor_of
from edgekd.quantization.fake_quant import FakeQuant


def convert(
    graph_module: GraphModule, *, unsigned: bool = False, fold_weights: bool = True
) -> GraphModule:
    """A copy with quantize and dequantize operators in place of fake-quantizers.

    Args:
        unsigned: int8 activations become uint8, without loss.
        fold_weights: weights are stored as integers; otherwise as the floats that these stand
            for, with quantize and dequantize operators behind them.

    Weights are first set to their quantized values, so that a range narrower than the integer
    type (7 bits) is kept without a Clip in the exported file.
    """
    converted = copy.deepcopy(graph_module)
    with torch.no_grad():
        for node in converted.graph.nodes:
            if node.op != "call_module":
                continue
            quantizer = converted.get_submodule(str(node.target))
            assert isinstance(quantizer, FakeQuant)
            source = arguments(node)[0]
            if source.op == "get_attr":
                weight = tensor_of(converted, source)
                assert weight is not None
                weight.copy_(quantizer(weight))
            elif unsigned and quantizer.dtype is torch.int8 and not quantizer.symmetric:
                quantizer.to_unsigned()
    done = convert_pt2e(converted, fold_quantize=fold_weights)
    assert isinstance(done, GraphModule)
    return done
