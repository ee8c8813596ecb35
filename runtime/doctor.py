"""What this machine has for serving on AMD cards, what is missing, and how to get it.

Theory of operation. Each check looks at one thing and gives findings (`runtime.stacks.Finding`);
`examine` runs all of them. They read files below `Host.root`, which is `/` outside of tests, and
start nothing but the interpreter that is asked for its packages. A machine without a card is no
fault: findings say `missing`, and what still runs there is the command's to say.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from runtime.cards.doctor import (
    GIB,
    SeenCard,
    card_findings,
    chips_to_serve_on,
    iommu,
    link_finding,
    seen_cards,
)
from runtime.cards.readers import AMD, read_text
from runtime.stacks import (
    Finding,
    Installed,
    ask,
    judge_rocm,
    judge_torch,
    judge_triton,
    judge_vllm,
)

HOST_BYTES_PER_WORKER = 13.1e9
"""Host memory that one vLLM worker was seen to use (RX 9070 XT record, FACTS section 1)."""

_DISPLAY_CLASS = "0x03"
_DEPLOY_NEEDS = ("aiohttp", "prometheus_client", "psutil")
_JOIN_GROUPS = "sudo usermod -aG video,render $USER, then log in again"


def _may_open(path: Path) -> bool:
    return os.access(path, os.R_OK | os.W_OK)


@dataclass(frozen=True, slots=True)
class Host:
    """The machine to look at, and how to ask it."""

    root: Path = Path("/")
    """Where its `/proc`, `/sys`, `/dev` and `/opt` are."""
    python: Path = Path(sys.executable)
    """The interpreter that runs, or would run, vLLM."""
    weights: Path = Path("~/.cache/huggingface")
    """Where models are kept."""
    ports: tuple[int, ...] = (8080,)
    """TCP ports that serving would listen on."""
    may_open: Callable[[Path], bool] = _may_open
    which: Callable[[str], str | None] = shutil.which
    ask: Callable[[Path], Installed] = ask


# --------------------------------------------------------------------------------------
# Everything


def examine(host: Host) -> list[Finding]:
    """All findings of a machine. Raises InputError when `host.python` is no Python."""
    cards = seen_cards(host.root)
    engine = container_engine(host)
    return [
        kernel_driver(host),
        *device_files(host),
        *card_findings(cards),
        *map(link_finding, cards),
        iommu(host.root, len(cards)),
        *packages(host, chips_to_serve_on(cards), engine),
        engine,
        serving_extra(),
        host_memory(host, len(cards)),
        disk(host, cards),
        *ports(host),
    ]


def ready_for_cards(findings: Iterable[Finding]) -> bool:
    """Whether nothing that a worker on a card needs is missing or wrong."""
    return all(one.state in ("ok", "unknown") for one in findings if one.needed)


# --------------------------------------------------------------------------------------
# The driver and its devices


def kernel_driver(host: Host) -> Finding:
    """Whether `amdgpu` is loaded, and which."""
    module = host.root / "sys/module/amdgpu"
    loaded = re.search(r"^amdgpu ", read_text(host.root / "proc/modules") or "", re.MULTILINE)
    if module.is_dir() or loaded:
        version = read_text(module / "version")
        kernel = read_text(host.root / "proc/sys/kernel/osrelease") or "?"
        said = f"amdgpu {version}" if version else f"amdgpu of kernel {kernel}"
        return Finding("kernel driver", "ok", said, needed=True)
    if not any(_amd_displays(host)):
        said = "amdgpu is not loaded, and no AMD card is on the PCI bus"
        return Finding("kernel driver", "missing", said, needed=True)
    repair = "sudo modprobe amdgpu; if that fails: sudo amdgpu-install --usecase=dkms, and dmesg"
    said = "there is an AMD card, but amdgpu is not loaded"
    return Finding("kernel driver", "missing", said, repair, needed=True)


def device_files(host: Host) -> list[Finding]:
    """Whether this user may open what computing on a card opens."""
    render = sorted((host.root / "dev/dri").glob("renderD*"))
    return [
        _device_file(host, "/dev/kfd", [host.root / "dev/kfd"]),
        _device_file(host, "/dev/dri", render),
    ]


def _device_file(host: Host, subject: str, paths: Sequence[Path]) -> Finding:
    there = [path for path in paths if path.exists()]
    if not there:
        how = f"comes with the kernel driver; into a container with --device={subject}"
        repair = how if any(_amd_displays(host)) else ""
        return Finding(subject, "missing", "nothing to compute on", repair, needed=True)
    closed = [path.name for path in there if not host.may_open(path)]
    if closed:
        said = f"{', '.join(closed)}: this user may not open it"
        return Finding(subject, "wrong", said, _JOIN_GROUPS, needed=True)
    names = ", ".join(path.name for path in there)
    return Finding(subject, "ok", f"{names}: open to this user", needed=True)


def _amd_displays(host: Host) -> Iterator[Path]:
    for path in (host.root / "sys/bus/pci/devices").glob("*"):
        is_display = (read_text(path / "class") or "").startswith(_DISPLAY_CLASS)
        if is_display and read_text(path / "vendor") == AMD:
            yield path


# --------------------------------------------------------------------------------------
# Software


def packages(host: Host, chips: Sequence[str], engine: Finding) -> list[Finding]:
    """ROCm, PyTorch, Triton and vLLM, judged for every kind of chip there is."""
    rocm = _rocm(host)
    installed = host.ask(host.python)
    in_container = engine.state == "ok"
    found = []
    for chip in chips or (None,):
        found += [
            judge_rocm(chip, rocm),
            judge_torch(chip, rocm, installed),
            judge_triton(chip, installed),
            judge_vllm(chip, installed, in_container),
        ]
    return list(dict.fromkeys(found))


def container_engine(host: Host) -> Finding:
    """Whether docker or podman is there for this user."""
    subject = "containers"
    socket = host.root / "var/run/docker.sock"
    if host.which("podman"):
        return Finding(subject, "ok", "podman")
    if not host.which("docker"):
        how = "install podman or docker, unless workers run from a Python environment"
        return Finding(subject, "missing", "neither docker nor podman", how)
    if not socket.exists():
        return Finding(subject, "wrong", "docker does not run", "sudo systemctl start docker")
    if not host.may_open(socket):
        how = "sudo usermod -aG docker $USER, then log in again; or install podman"
        return Finding(subject, "wrong", "docker is closed to this user", how)
    return Finding(subject, "ok", "docker")


def serving_extra() -> Finding:
    """Whether this Python has what `viisim deploy` imports."""
    absent = [name for name in _DEPLOY_NEEDS if find_spec(name) is None]
    if absent:
        said = f"not installed: {', '.join(absent)}"
        return Finding("viisim deploy", "missing", said, "pip install 'viisim[deploy]'", True)
    return Finding("viisim deploy", "ok", "its packages are installed", needed=True)


def _rocm(host: Host) -> str | None:
    """The version of ROCm below /opt: the one in force, else the newest."""
    opt = host.root / "opt"
    files = [opt / "rocm/.info/version", *sorted(opt.glob("rocm-*/.info/version"), reverse=True)]
    return next((text for path in files if (text := read_text(path))), None)


# --------------------------------------------------------------------------------------
# Room


def host_memory(host: Host, card_count: int) -> Finding:
    """The host's memory, against what a worker was seen to use."""
    content = read_text(host.root / "proc/meminfo") or ""
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+)", content, re.M)}
    if "MemAvailable" not in kib:
        return Finding("memory", "unknown", "/proc/meminfo does not tell")
    available_bytes = kib["MemAvailable"] * 1024
    said = f"{available_bytes / GIB:.1f} GiB available of {kib['MemTotal'] * 1024 / GIB:.1f}"
    if available_bytes < HOST_BYTES_PER_WORKER * card_count:
        seen = f"{HOST_BYTES_PER_WORKER / 1e9:.1f} GB of host memory"
        said += f"; one vLLM worker was seen to take {seen}, and there are {card_count} cards"
        return Finding("memory", "unknown", said, "start fewer workers, or watch it swap")
    return Finding("memory", "ok", said)


def disk(host: Host, cards: Sequence[SeenCard]) -> Finding:
    """Free space where weights are kept, against the memory of the largest card."""
    folder = host.weights.expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    free_bytes = shutil.disk_usage(existing).free
    said = f"{free_bytes / GIB:.0f} GiB free for weights in {folder}"
    largest_bytes = max((card.reading.vram_total_bytes or 0 for card in cards), default=0)
    if free_bytes < largest_bytes:
        how = "free some, or set HF_HOME to another disk; nothing to do if the weights are there"
        return Finding("disk", "unknown", f"{said}, less than a card holds", how)
    return Finding("disk", "ok", said)


def ports(host: Host) -> Iterator[Finding]:
    """Whether the ports are free that serving would listen on."""
    taken = _listening(host)
    for port in host.ports:
        if port in taken:
            how = f"ss -ltnp 'sport = :{port}' says who; or give another with deploy.listen"
            yield Finding(f"port {port}", "wrong", "something listens there already", how)
        else:
            yield Finding(f"port {port}", "ok", "free")


def _listening(host: Host) -> set[int]:
    """The TCP ports that are listened on (state 0A), by the kernel's tables."""
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in (read_text(host.root / "proc/net" / name) or "").splitlines()[1:]
    ]
    return {int(line[1].rpartition(":")[2], 16) for line in lines if line[3:4] == ["0A"]}
