"""Network: the tensor-in/tensors-out core that every stage takes and gives back."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

from edgekd.errors import ModelError, StateError, describe_invalid
from edgekd.files import write_atomically
from edgekd.models.build import Build, build_module
from edgekd.pruning.layers import Resized, resize
from edgekd.target import QuantScheme
from edgekd.tasks.decoding import Decoding

FORMAT = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Preprocessing(_Frozen):
    """What turns a uint8 image into the input: (x / 255 − mean) / std, per channel.

    Attributes:
        fit: how it gets the input's size: "crop": the shorter side is resized, the middle kept;
            "letterbox": the whole image, see `edgekd.data.detection`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Literal["crop", "letterbox"] = "crop"


class Input(_Frozen):
    """One input; `shape` leaves the batch axis (always 0, dynamic) out."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


class IO(_Frozen):
    """What goes in and comes out: all that export and bundles read.

    Attributes:
        decoding: how a detector's outputs become boxes.
    """

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()
    decoding: Decoding | None = None

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """Zeros of the inputs' shapes, (batch, ...)."""
        return tuple(
            torch.zeros((batch, *i.shape), dtype=getattr(torch, i.dtype)) for i in self.inputs
        )

    def divide(self, batch: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A batch of data as (inputs, targets): its first tensors are the inputs, in their order.

        Raises:
            ModelError: there are fewer tensors, or an input has another type.
        """
        count = len(self.inputs)
        given = [str(x.dtype).removeprefix("torch.") for x in batch]
        wanted = [i.dtype for i in self.inputs]
        if given[:count] != wanted:
            names = ", ".join(f"{i.name} {i.dtype}" for i in self.inputs)
            raise ModelError(
                f"this network takes {count} input{'s' * (count > 1)} ({names}); the batch is of "
                f"{len(given)} ({', '.join(given)}): give batches of the inputs in this order, "
                "and of the targets behind them"
            )
        return tuple(batch[:count]), tuple(batch[count:])


class Network:
    """A module with what is known of its inputs and outputs.

    `scheme is None`: an eager float module. Otherwise the captured, folded, fake-quantized and
    trainable graph for that scheme; `float_layers` are those that stay in float all the same.
    `resized` (module path -> attribute -> value) says where
    `prune` made the module narrower than its factory does.

    Args:
        module: any `nn.Module` that takes tensors of (N, ...) and returns a tensor, or a tuple
            or dict of tensors.
        example_inputs: one tensor, a sequence of tensors, or a dict of them by the names of
            `forward`'s parameters; only names, shapes and types are kept.
        preprocessing: how images become inputs.
        labels: class names, in the order of the output.
        decoding: how a detector's outputs become boxes; None takes what the module's own
            `box_decoding(height, width)` says, if it has one.
        build: the factory that rebuilds the module; without one, `load` needs `module=`.

    Raises:
        ModelError: the module fails on the example inputs, or on two of the one sample in them.

    Example:
        >>> import torch, edgekd
        >>> net = edgekd.Network(torch.nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 16, 16))
        >>> net.params, net.macs
        (224, 42336)
    """

    def __init__(
        self,
        module: nn.Module,
        example_inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
        *,
        preprocessing: Preprocessing | None = None,
        labels: Sequence[str] = (),
        decoding: Decoding | None = None,
        build: Build | None = None,
    ) -> None:
        named = _named_inputs(module, example_inputs)
        examples = tuple(named.values())
        if decoding is None and hasattr(module, "box_decoding"):
            core: Any = module
            decoding = core.box_decoding(*examples[0].shape[2:])
        self.module = module
        self.build = build
        self.scheme: QuantScheme | None = None
        self.float_layers: tuple[str, ...] = ()
        self.resized: Resized = {}
        self._programs: dict[tuple[bool, bool], torch.export.ExportedProgram] = {}
        self.onnx: dict[tuple[int, bool], Any] = {}  # kept by `runtimes/onnx_graph.py`
        self.io = IO(
            inputs=tuple(
                Input(
                    name=name,
                    shape=tuple(x.shape[1:]),
                    dtype=str(x.dtype).removeprefix("torch."),
                )
                for name, x in named.items()
            ),
            outputs=self._output_names(examples),
            preprocessing=preprocessing,
            labels=tuple(labels),
            decoding=decoding,
        )

    def _output_names(self, examples: tuple[Tensor, ...]) -> tuple[str, ...]:
        if any(parameter.is_meta for parameter in self.module.parameters()):
            return ()  # shapes alone: it is priced, and never run
        given, remedy = examples, ""
        try:
            with eval_mode(self.module), torch.no_grad():
                out = self.module(*examples)
                if any(len(x) == 1 for x in examples):
                    given = tuple(torch.cat([x, x]) for x in examples)
                    remedy = "; it fixes the batch at 1: use x.size(0) or flatten(1)"
                    self.module(*given)
        except Exception as error:
            shapes = [tuple(x.shape) for x in given]
            raise ModelError(
                f"{type(self.module).__name__} fails on the example inputs {shapes}: {error}"
                f"{remedy}"
            ) from error
        if isinstance(out, Mapping):
            return tuple(out)
        if not isinstance(out, Tensor | Sequence):
            raise ModelError(
                f"{type(self.module).__name__} gives a {type(out).__name__}; it has to give a "
                "tensor, or a tuple or dict of tensors"
            )
        count = 1 if isinstance(out, Tensor) else len(out)
        return ("output",) if count == 1 else tuple(f"output{i}" for i in range(count))

    def __call__(self, *inputs: Tensor) -> Any:
        """The module's outputs as they come: a tensor, or a tuple or dict of tensors."""
        given, rest = self.io.divide(inputs)
        if rest:
            raise ModelError(
                f"this network takes {len(given)} inputs and gets {len(inputs)}: leave out targets"
            )
        return self.module(*given)

    def __repr__(self) -> str:
        kind = "float" if self.scheme is None else self.scheme.activation_dtype
        return f"Network({self.params:,} parameters, {kind}, inputs {self.io.inputs})"

    # ---- size --------------------------------------------------------------------------------

    @property
    def params(self) -> int:
        """Number of weights and biases; scales of quantizers are not counted."""
        return sum(
            t.numel() for name, t, is_parameter in self._tensors() if is_parameter
            and not name.startswith("quant.")
        )  # fmt: skip

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample, counted by torch's flop counter."""
        counter = FlopCounterMode(display=False)
        device = next((t.device for _, t, _ in self._tensors()), torch.device("cpu"))
        mode = self.module.training
        self.train_mode(False)
        with counter, torch.no_grad():
            self.module(*(x.to(device) for x in self.io.example(2)))
        self.train_mode(mode)
        return counter.get_total_flops() // 4  # 2 flops a MAC, batch 2

    @property
    def architecture(self) -> str | None:
        """What sets its latency, as one line of JSON: factory, widths and inputs, no weights.

        None without a factory.
        """
        if self.build is None:
            return None
        made = self.build.without_fetching().model_dump(mode="json")
        inputs = [each.shape for each in self.io.inputs]
        return json.dumps(made | {"resized": self.resized, "inputs": inputs}, sort_keys=True)

    # ---- training ----------------------------------------------------------------------------

    def train_mode(self, training: bool) -> None:
        """Eager: `module.train(training)`. A captured graph has no modes: nothing happens."""
        if self.scheme is None:
            self.module.train(training)

    def copy(self) -> Network:
        """An independent copy; the stages train copies, never what they were given."""
        other = copy.copy(self)
        other.module = copy.deepcopy(self.module)
        other._programs, other.onnx = {}, {}
        return other

    def quantized(
        self, graph: GraphModule, scheme: QuantScheme, float_layers: Iterable[str] = ()
    ) -> Network:
        """This network with `graph`, placed for `scheme` and `float_layers`, as its module."""
        other = copy.copy(self)
        other.module, other.scheme = graph, scheme
        other._programs, other.onnx = {}, {}
        other.float_layers = tuple(sorted(float_layers))
        return other

    # ---- export ------------------------------------------------------------------------------

    def program(
        self, *, unsigned: bool = False, fold_weights: bool = True
    ) -> torch.export.ExportedProgram:
        """The network as every exporter takes it, computed once.

        Float: captured, BatchNorm folded. Quantized: a copy with quantize and dequantize
        operators in the fake-quantizers' place and integer weights.

        Args:
            unsigned: int8 activations as uint8; the zero points move, nothing else changes.
            fold_weights: False for a converter that makes integers of the weights by itself; the
                scheme may say so too.
        """
        key = unsigned, fold_weights
        if key not in self._programs:
            from edgekd.quantization.capture import capture, export_graph
            from edgekd.quantization.convert import convert

            if self.scheme is None:
                graph = capture(self.module, self.io.example(2))
            else:
                assert isinstance(self.module, GraphModule)
                fold = fold_weights and self.scheme.fold_weights
                graph = convert(self.module, unsigned=unsigned, fold_weights=fold)
            self._programs[key] = export_graph(graph, self.io.example(2))
        return self._programs[key]

    # ---- disk --------------------------------------------------------------------------------

    def _tensors(self) -> Iterator[tuple[str, Tensor, bool]]:
        """(name on disk, tensor, is it a parameter), each tensor once."""
        prefixes: dict[str, str] = {}
        if self.scheme is not None:
            from edgekd.quantization.placement import quantizers

            assert isinstance(self.module, GraphModule)
            by_module = {id(m): f"quant.{n}" for n, m in quantizers(self.module).items()}
            prefixes = {
                path: by_module[id(m)]
                for path, m in self.module.named_modules(remove_duplicate=True)
                if id(m) in by_module
            }
        for tensors, is_parameter in (
            (self.module.named_parameters(), True),
            (self.module.named_buffers(), False),
        ):
            for name, tensor in tensors:
                owner, _, leaf = name.rpartition(".")
                yield (f"{prefixes[owner]}.{leaf}" if owner in prefixes else name), tensor, \
                    is_parameter  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """The live tensors by their name on disk (`quant.<tensor>.scale` for quantizers)."""
        return {name: tensor for name, tensor, _ in self._tensors()}

    def load_state(self, state: Mapping[str, Tensor], origin: str) -> None:
        """Copy `state` in, strictly.

        Raises:
            StateError: names or shapes differ; the first ones are named.
        """
        own = self.state()
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or extra:
            raise StateError(
                f"{origin}: weights do not fit the network: missing {missing[:3]} "
                f"({len(missing)}), unexpected {extra[:3]} ({len(extra)})"
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise StateError(
                    f"{origin}: {name} has shape {tuple(state[name].shape)}; "
                    f"the network has {tuple(tensor.shape)}"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
        self._programs, self.onnx = {}, {}

    def save(self, folder: str | Path) -> None:
        """Write `spec.json` and `weights.safetensors`; nothing in them is pickled."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        quant = None
        if self.scheme is not None:
            from edgekd.quantization.placement import digest, quantizers

            assert isinstance(self.module, GraphModule)
            quant = {
                "scheme": self.scheme.model_dump(mode="json"),
                "float_layers": self.float_layers,
                "placement": list(quantizers(self.module)),
                "placement_sha256": digest(self.module),
                "torch": torch.__version__,
                "torchao": version("torchao"),
            }
        spec = {
            "format": FORMAT,
            "build": None if self.build is None else self.build.model_dump(mode="json"),
            "resized": self.resized,
            "io": self.io.model_dump(mode="json"),
            "quant": quant,
        }
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in self.state().items()}
        write_atomically(folder / "weights.safetensors", save(tensors))
        write_atomically(folder / "spec.json", json.dumps(spec, indent=1))

    @staticmethod
    def load(
        folder: str | Path, *, module: nn.Module | None = None, trust: bool = False
    ) -> Network:
        """Rebuild what `save` wrote: build → resize → (capture → fold → place) → strict load.

        Args:
            folder: holds `spec.json` and `weights.safetensors`.
            module: the untrained float module, where the network was saved without a factory.
            trust: run a factory outside edgekd, torchvision and timm that the spec names.

        Raises:
            StateError: files missing or damaged, or a placement that this version of torch or
                torchao does not reproduce.
        """
        folder = Path(folder)
        spec = _read_spec(folder)
        try:
            io = IO(**spec["io"])
            build = None if spec["build"] is None else Build(**spec["build"])
            quant = spec["quant"]
            scheme = None if quant is None else QuantScheme(**quant["scheme"])
            # absent from what versions without `prune` saved
            resized = TypeAdapter(dict[str, dict[str, int]]).validate_python(
                spec.get("resized", {}), strict=True
            )
        except ValidationError as error:
            raise StateError(f"{folder}/spec.json: {describe_invalid(error, IO)}") from None
        except (KeyError, TypeError) as error:
            raise StateError(f"{folder}/spec.json is damaged: no {error}") from None
        if module is None:
            if build is None:
                raise StateError(
                    f"{folder} was saved without a factory; give its untrained float module: "
                    "Network.load(path, module=...)"
                )
            module = build_module(build, trust=trust, origin=f"{folder}/spec.json")
        if resized:
            resize(module, resized, f"{folder}/spec.json")
        net = Network(module, io.example(2), build=build)
        net.io, net.resized = io, resized
        if scheme is not None:
            from edgekd.quantization.capture import capture
            from edgekd.quantization.placement import digest, place

            float_layers = quant.get("float_layers", ())
            graph = place(capture(module, io.example(2)), scheme, float_layers)
            if digest(graph) != quant["placement_sha256"]:
                raise StateError(
                    f"{folder}: quantizers are placed differently here (torch "
                    f"{torch.__version__}, torchao {version('torchao')}) than where it was saved "
                    f"(torch {quant['torch']}, torchao {quant['torchao']}); install those "
                    "versions, or quantize again: newer versions of edgekd place otherwise too"
                )
            net = net.quantized(graph, scheme, float_layers)
        net.load_state(read_tensors(folder / "weights.safetensors"), str(folder))
        return net


def _named_inputs(
    module: nn.Module, examples: Tensor | Sequence[Tensor] | Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The example inputs by name, in the order in which `forward` takes them."""
    if isinstance(examples, Tensor):
        return {"input": examples}
    if not isinstance(examples, Mapping):
        only = len(examples) == 1
        return {"input" if only else f"input{i}": x for i, x in enumerate(examples)}
    parameters = list(inspect.signature(module.forward).parameters)
    first = parameters[: len(examples)]
    if set(first) != set(examples):
        raise ModelError(
            f"{type(module).__name__}.forward takes {', '.join(parameters)}; the example inputs "
            f"are {', '.join(examples)}: name its first parameters, all that are tensors"
        )
    return {name: examples[name] for name in first}


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Within the block `module` is in eval mode; behind it, each part is in the mode it had."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _read_spec(folder: Path) -> dict[str, Any]:
    try:
        spec: dict[str, Any] = json.loads((folder / "spec.json").read_text())
        found = spec["format"]
    except FileNotFoundError:
        raise StateError(f"{folder} holds no saved network (no spec.json)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(f"{folder}/spec.json is damaged: {error}") from None
    if found != FORMAT:
        raise StateError(f"{folder}/spec.json has format {found}; this version reads {FORMAT}")
    return spec


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise StateError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise StateError(f"{path} is damaged: {error}") from None
    return tensors
