"""One stage's folder: its log, its checkpoint, and the file that says it is done."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgekd.errors import StateError
from edgekd.files import write_atomically
from edgekd.target import QuantScheme, Target


@dataclass(frozen=True)
class RunDir:
    """`metrics.jsonl`, `last.ckpt` and `done.json` in `path`.

    Each file appears whole or not at all, and `done.json` is written last, so a process may be
    killed at any instant.
    """

    path: Path

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to the metrics."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """The metrics logged so far; a last line cut short by a kill is left out."""
        records = []
        try:
            lines = (self.path / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint; `state` holds tensors and plain values only."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()  # torch.save into a full disk raises no OSError
        torch.save(state, content)
        write_atomically(self.path / "last.ckpt", content.getvalue())

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, None if there is none.

        The log is cut back to what had been logged when it was written.
        """
        path = self.path / "last.ckpt"
        if not path.is_file():
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
            return None
        with path.open("rb") as file:
            try:
                state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
                step = state["step"]
            except Exception as error:  # torch.load raises a dozen unrelated types
                raise StateError(
                    f"{path} is damaged, or holds more than tensors and plain values "
                    f"({type(error).__name__}); delete it to start this stage again"
                ) from None
        kept = [json.dumps(r) + "\n" for r in self.history() if r["step"] <= step]
        write_atomically(self.path / "metrics.jsonl", "".join(kept))
        return state

    def done(self) -> dict[str, Any] | None:
        """What `finish` recorded, None if the stage has not ended."""
        path = self.path / "done.json"
        try:
            record: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StateError(f"{path} is damaged ({error}); delete it to redo the stage") from None
        return record

    def finish(self, record: dict[str, Any]) -> None:
        """Mark the stage as done; its checkpoint is no longer needed."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "done.json", json.dumps(record, indent=1))
        (self.path / "last.ckpt").unlink(missing_ok=True)


# a recipe's stages that a target may be given, the last one first
GIVEN = ("quantize", "prune", "distill")


def final_network(folder: Path, target: Target) -> Path:
    """The folder of the network that goes to `target`: `folder` itself, or a stage in a run.

    Of a run (`runs/NAME`), the last stage whose network the target takes: quantized if it runs
    integers and the run has any, else the float network that was pruned, or distilled.

    Raises:
        StateError: no such network (its integers are other targets'), or several (control arms,
            other options): their folders.
    """
    if (folder / "spec.json").is_file():
        return folder
    known = [path for path in sorted(folder.glob("*-*/")) if (path / "done.json").is_file()]
    known = [path for path in known if (path / "spec.json").is_file()]
    for stage in GIVEN:
        made = [path for path in known if path.name.startswith(f"{stage}-")]
        fitting = [path for path in made if _takes(target, path)]
        if len(fitting) > 1:
            raise StateError(
                f"{folder} holds {len(fitting)} networks for {target.name}; give one of: "
                + ", ".join(map(str, fitting))
            )
        if fitting:
            return fitting[0]
        if stage == "quantize" and made and target.scheme is not None:
            raise StateError(
                f"{folder} holds integers of other targets' schemes only; add {target.name} to the "
                "recipe and run it, or give the folder of a float network"
            )
    raise StateError(
        f"{folder} holds no network for {target.name}; give a folder with spec.json, or a run's "
        f"folder with a stage that is done ({', '.join(GIVEN)})"
    )


def _takes(target: Target, folder: Path) -> bool:
    try:
        quant = json.loads((folder / "spec.json").read_text())["quant"]
        scheme = None if quant is None else QuantScheme(**quant["scheme"])
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(f"{folder}/spec.json is damaged: {error}") from None
    if scheme is None:
        return target.float_precision is not None
    return target.scheme is not None and scheme.fits(target.scheme)


def exports(folder: Path, target: Target) -> list[Path]:
    """The folders of the artifacts that a run made for `target`.

    Raises:
        StateError: none.
    """
    named = f"export-{target.name}-{'[0-9a-f]' * 12}"
    made = [path for path in sorted(folder.glob(named)) if (path / "done.json").is_file()]
    if not made:
        raise StateError(
            f"{folder} holds no artifact for {target.name}; add it to the recipe and run that, or "
            f"run: edgekd export {folder} --target {target.name} --out FOLDER"
        )
    return made
