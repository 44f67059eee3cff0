"""The emulated Arm machine: its parts, and a small artifact on it where it is set up."""

from __future__ import annotations

import os
from pathlib import Path

import arm_check as arm
import numpy as np
import pytest
import torch

from edgekd.network import Network
from edgekd.runtimes.onnxruntime import OnnxRuntime
from edgekd.stages.export import export
from edgekd.stages.quantize import quantize
from edgekd.target import Target

ROOT = Path(os.environ.get("EDGEKD_ARM_ROOT", arm.ROOT))


@pytest.mark.skipif(
    not arm.is_set_up(ROOT), reason=f"no Arm machine in {ROOT}: tools/arm_check.py makes it"
)
@pytest.mark.parametrize("target", ["android-arm64", "raspberry-pi-4"])
def test_an_artifact_on_arm_kernels(
    trained: Network, batches: list[tuple[torch.Tensor, torch.Tensor]], target: str, tmp_path: Path
):
    quantized = quantize(trained, target=target, data=batches[:2], correct_bias=False)
    path = export(quantized, target=target, out=tmp_path).path
    images = batches[5][0][:12].numpy()
    (theirs,), kernels = arm.run_on_arm(ROOT, target, path, [images], "default")
    assert kernels is not None
    assert kernels[0] == kernels[1] > 3  # the integer kernels are what ran
    [here] = OnnxRuntime().load(path, threads=1, emulated=True)([images])
    assert theirs.shape == here.shape == (12, 4)
    step = arm.output_step(here, quantized)
    assert np.abs(theirs - here).max() < 0.01 * step
    assert arm.bundle_passes(ROOT, target, tmp_path)
    with pytest.raises(arm.ArmError, match="exits with 1"):
        arm.run_on_arm(ROOT, target, path, [images[:, :1]], "default")


def test_every_target_with_a_core_is_an_arm_target_of_one_scheme():
    targets = [Target.load(name) for name in arm.CORES]
    assert {t.runtime for t in targets} == {"onnxruntime"}
    assert all(targets[0].scheme == t.scheme for t in targets)
    assert all(t.verifier == "emulated" for t in targets)


def test_the_features_of_a_core():
    # /proc/cpuinfo of a Raspberry Pi 4: fp asimd evtstrm crc32 cpuid
    assert arm.features(0b1000_1000_0111, 0) == "fp asimd evtstrm crc32 cpuid"
    # bit numbers of Linux' arch/arm64/include/uapi/asm/hwcap.h
    assert arm.features(1 << 20, 0) == "asimddp"
    assert arm.features(1 << 31, 1 << 13) == "pacg i8mm"
    lines = arm.cpuinfo("fp asimd", "0xd08").splitlines()
    assert "Features\t: fp asimd" in lines
    assert "CPU part\t: 0xd08" in lines


def test_missing_tools_are_named_with_their_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(arm.ArmError, match=r"qemu-aarch64-static is missing; run: sudo apt-get"):
        arm.set_up(tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_a_folder_appears_when_it_is_full(tmp_path: Path):
    with pytest.raises(arm.ArmError, match="exits with 3: no"), arm._whole(tmp_path / "a"):
        arm._command("sh", "-c", "echo no >&2; exit 3")
    assert not (tmp_path / "a").exists()
    with arm._whole(tmp_path / "a") as folder:
        assert list(folder.iterdir()) == []
        (folder / "file").touch()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_figures_of_a_run(quantized: Network):
    ours = np.array([[0, 127, 5, 3], [0, 10, 5, 127]], dtype=np.float32) / 127
    same = arm.compare(quantized, ours, ours)
    assert (same["n"], same["agreement"], same["exact"], same["max_steps"]) == (2, 1, 1, 0)
    theirs = ours.copy()
    theirs[1, 0] = 2  # another answer
    found = arm.compare(quantized, ours, theirs)
    assert (found["agreement"], found["exact"]) == (0.5, 7 / 8)
    assert found["max_steps"] == pytest.approx(2 / arm.output_step(ours, quantized))
    assert found["mean_steps"] == pytest.approx(found["max_steps"] / 8)
    row = {"network": "n", "target": "t", "core": "c", "file": "f", "optimizations": "off", **found}
    assert arm.table([row, row | {"integer_matrix_ops": (4, 5)}]).row_count == 2


def test_what_is_sound():
    assert arm.agrees({"agreement": 0.995, "n": 1000})
    assert not arm.agrees({"agreement": 0.994, "n": 1000})
    assert arm.agrees({"agreement": 39 / 40, "n": 40})  # one answer
    assert not arm.agrees({"agreement": 38 / 40, "n": 40})
    assert not arm.agrees({"agreement": 1.0, "n": 40, "bundle_passes": False})
