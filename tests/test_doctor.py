"""`viisim doctor`: what it finds in a tree of files like those of a machine."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.doctor import Host, container_engine, disk, examine, ready_for_cards
from runtime.stacks import (
    Finding,
    Installed,
    ask,
    chip_of,
    judge_rocm,
    judge_torch,
    judge_triton,
    judge_vllm,
    numbers,
)
from viisim.cli import main
from viisim.errors import InputError

FORK = Installed(
    python="3.12.11",
    torch="2.11.0a0+git1234567",
    hip="6.3.42134",
    triton="3.6.0+gfx906",
    vllm="0.23.1+gfx906",
)
UPSTREAM = Installed("3.12.3", "2.9.1+rocm7.0", "7.0.51831", "3.5.1", "0.18.0+rocm700")
BARE = Installed("3.11.9")


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")


def add_card(root: Path, number: int, riser: tuple[str, int] = ("8.0 GT/s PCIe", 16)) -> Path:
    """A Radeon VII behind the switch that it has on board, as the kernel shows it."""
    port = root / f"sys/devices/pci0000:00/0000:00:0{number}.1"
    bridge = port / f"0000:{number}0:00.0"
    device = bridge / f"0000:{number}1:00.0" / f"0000:{number}2:00.0"
    for folder, (speed, width) in (
        (port, riser),
        (bridge, riser),
        (bridge / f"0000:{number}1:00.0", ("8.0 GT/s PCIe", 16)),
        (device, ("8.0 GT/s PCIe", 16)),
    ):
        write(folder / "current_link_speed", speed)
        write(folder / "current_link_width", width)
    files = {
        "vendor": "0x1002",
        "device": "0x66af",
        "class": "0x030000",
        "max_link_speed": "8.0 GT/s PCIe",
        "max_link_width": 16,
        "mem_info_vram_total": 17163091968,
        "hwmon/hwmon3/name": "amdgpu",
        "hwmon/hwmon3/power1_cap": 250_000_000,
        "hwmon/hwmon3/power1_cap_max": 300_000_000,
        f"drm/renderD{127 + number}/dev": f"226:{127 + number}",
    }
    for name, text in files.items():
        write(device / name, text)
    for link in (
        root / f"sys/class/drm/card{number}/device",
        root / f"sys/bus/pci/devices/{device.name}",
    ):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(device)
    write(root / f"dev/dri/renderD{127 + number}", "")
    node = root / f"sys/class/kfd/kfd/topology/nodes/{number}/properties"
    write(node, f"gfx_target_version 90006\ndrm_render_minor {127 + number}")
    return device


def bare_box(root: Path) -> None:
    write(root / "proc/meminfo", "MemTotal: 65843200 kB\nMemAvailable: 62914560 kB")
    write(root / "proc/cmdline", "BOOT_IMAGE=/vmlinuz quiet")
    write(root / "proc/net/tcp", "  sl  local_address rem_address   st\n")


def box_of(root: Path, cards: int = 1) -> None:
    """A machine of Radeon VII that lacks nothing."""
    bare_box(root)
    write(root / "sys/module/amdgpu/version", "6.10.5")
    write(root / "opt/rocm/.info/version", "6.3.4-76")
    write(root / "dev/kfd", "")
    write(root / "sys/class/kfd/kfd/topology/nodes/0/properties", "gfx_target_version 0")
    for number in range(1, cards + 1):
        add_card(root, number)


def host_of(root: Path, installed: Installed = FORK, **given: Any) -> Host:
    settings: dict[str, Any] = {
        "root": root,
        "weights": root,
        "may_open": lambda _: True,
        "which": lambda _: None,
        "ask": lambda _: installed,
    }
    return Host(**settings | given)


def found(subject: str, host: Host) -> Finding:
    (one,) = [finding for finding in examine(host) if finding.subject == subject]
    return one


# --------------------------------------------------------------------------------------
# Whole machines


def test_a_box_with_all_it_needs_is_ready(tmp_path: Path) -> None:
    box_of(tmp_path, cards=2)
    findings = examine(host_of(tmp_path))
    assert {one.subject: one.said for one in findings if one.state not in ("ok", "missing")} == {}
    assert ready_for_cards(findings)


def test_a_machine_without_anything_is_not_ready_and_raises_nothing(tmp_path: Path) -> None:
    findings = examine(host_of(tmp_path, BARE))
    assert not ready_for_cards(findings)
    assert {"kernel driver", "/dev/kfd", "cards"} <= {
        one.subject for one in findings if one.state == "missing"
    }


def test_every_finding_is_one_line(tmp_path: Path) -> None:
    box_of(tmp_path, cards=3)
    findings = examine(host_of(tmp_path, BARE, may_open=lambda _: False))
    assert [one for one in findings if "\n" in one.said + one.repair or not one.said] == []


# --------------------------------------------------------------------------------------
# Driver and devices


def test_the_driver_is_named_with_its_version(tmp_path: Path) -> None:
    box_of(tmp_path)
    assert found("kernel driver", host_of(tmp_path)).said == "amdgpu 6.10.5"


def test_a_driver_that_comes_with_the_kernel_is_named_by_it(tmp_path: Path) -> None:
    write(tmp_path / "proc/modules", "nfs 1 0 - Live 0x0\namdgpu 20000 3 - Live 0x0")
    write(tmp_path / "proc/sys/kernel/osrelease", "6.8.0-60-generic")
    driver = found("kernel driver", host_of(tmp_path))
    assert (driver.state, driver.said) == ("ok", "amdgpu of kernel 6.8.0-60-generic")


def test_a_card_without_a_driver_is_told_from_no_card(tmp_path: Path) -> None:
    write(tmp_path / "sys/bus/pci/devices/0000:03:00.0/vendor", "0x1002")
    write(tmp_path / "sys/bus/pci/devices/0000:03:00.0/class", "0x030000")
    driver = found("kernel driver", host_of(tmp_path))
    assert driver.said == "there is an AMD card, but amdgpu is not loaded"
    assert "modprobe amdgpu" in driver.repair


def test_devices_closed_to_this_user_name_the_groups_to_join(tmp_path: Path) -> None:
    box_of(tmp_path)
    kfd = found("/dev/kfd", host_of(tmp_path, may_open=lambda path: path.name != "kfd"))
    assert (kfd.state, kfd.needed) == ("wrong", True)
    assert "video,render" in kfd.repair


def test_one_closed_render_node_of_several_is_named(tmp_path: Path) -> None:
    box_of(tmp_path, cards=2)
    closed = host_of(tmp_path, may_open=lambda path: path.name != "renderD129")
    assert found("/dev/dri", closed).said == "renderD129: this user may not open it"


# --------------------------------------------------------------------------------------
# Cards


def test_a_card_shows_its_chip_memory_and_cap(tmp_path: Path) -> None:
    box_of(tmp_path)
    card = found("card 0", host_of(tmp_path))
    assert card.said == "gfx906, 15.98 GiB, cap 250 W of at most 300; card1 at 0000:12:00.0"


def test_a_chip_is_known_by_its_pci_id_where_the_compute_driver_is_silent(tmp_path: Path) -> None:
    box_of(tmp_path)
    (tmp_path / "sys/class/kfd/kfd/topology/nodes/1/properties").unlink()
    assert found("card 0", host_of(tmp_path)).said.startswith("gfx906")


def test_a_riser_shows_though_the_chip_behind_its_own_switch_sees_16_lanes(tmp_path: Path) -> None:
    box_of(tmp_path, cards=0)
    add_card(tmp_path, 1, riser=("2.5 GT/s PCIe", 1))
    link = found("card 0 PCIe", host_of(tmp_path))
    assert link.state == "wrong"
    assert link.said == "gen1 x1; the card has gen3 x16: filling its memory takes 69 s"


def test_a_narrow_link_does_not_keep_a_box_from_being_ready(tmp_path: Path) -> None:
    box_of(tmp_path, cards=0)
    add_card(tmp_path, 1, riser=("2.5 GT/s PCIe", 1))
    assert ready_for_cards(examine(host_of(tmp_path)))


def test_a_slow_but_wide_link_may_be_asleep(tmp_path: Path) -> None:
    box_of(tmp_path, cards=0)
    add_card(tmp_path, 1, riser=("2.5 GT/s PCIe", 16))
    link = found("card 0 PCIe", host_of(tmp_path))
    assert link.state == "unknown"
    assert "under load" in link.repair


def test_half_the_lanes_are_no_fault(tmp_path: Path) -> None:
    box_of(tmp_path, cards=0)
    add_card(tmp_path, 1, riser=("8.0 GT/s PCIe", 8))
    assert found("card 0 PCIe", host_of(tmp_path)).state == "ok"


def test_a_link_that_is_down_is_unknown(tmp_path: Path) -> None:
    box_of(tmp_path, cards=0)
    device = add_card(tmp_path, 1)
    write(device / "max_link_width", 255)
    assert found("card 0 PCIe", host_of(tmp_path)).state == "unknown"


@pytest.mark.parametrize(
    ("cards", "cmdline", "state"),
    [
        (2, "quiet", "ok"),
        (3, "quiet", "wrong"),
        (3, "quiet iommu=pt", "ok"),
        (3, "quiet amd_iommu=off", "ok"),
        (3, "quiet noiommu=pt", "wrong"),
    ],
)
def test_above_two_cards_the_iommu_must_be_out_of_the_way(
    tmp_path: Path, cards: int, cmdline: str, state: str
) -> None:
    box_of(tmp_path, cards)
    write(tmp_path / "proc/cmdline", cmdline)
    write(tmp_path / "sys/class/iommu/ivhd0/name", "")
    assert found("IOMMU", host_of(tmp_path)).state == state


def test_an_iommu_that_is_not_active_needs_no_pass_through(tmp_path: Path) -> None:
    box_of(tmp_path, cards=3)
    assert found("IOMMU", host_of(tmp_path)).said == "none is active"


# --------------------------------------------------------------------------------------
# Versions


@pytest.mark.parametrize(
    ("number", "chip"),
    [(90006, "gfx906"), (90010, "gfx90a"), (100302, "gfx1032"), (120001, "gfx1201")],
)
def test_the_drivers_number_is_the_compilers_name(number: int, chip: str) -> None:
    assert chip_of(number) == chip


@pytest.mark.parametrize(
    ("chip", "rocm", "state"),
    [
        ("gfx906", "6.3.4-76", "ok"),
        ("gfx906", "6.4.0", "wrong"),
        ("gfx906", "7.2.1", "wrong"),
        ("gfx906", "5.7.1", "wrong"),
        ("gfx1201", "6.4.1", "ok"),
        ("gfx1201", "6.4.0", "wrong"),
        ("gfx1201", "7.2.1", "ok"),
        ("gfx1031", "6.3.0", "unknown"),
        (None, "6.3.0", "ok"),
        ("gfx906", None, "missing"),
    ],
)
def test_rocm_is_judged_for_the_chip(chip: str | None, rocm: str | None, state: str) -> None:
    assert judge_rocm(chip, rocm).state == state


@pytest.mark.parametrize(
    ("torch", "hip", "rocm", "state"),
    [
        ("2.9.1+rocm6.3", None, "6.3.4", "ok"),
        ("2.9.1+rocm6.3", None, "7.2.0", "ok"),  # a wheel brings its own libraries
        ("2.11.0a0+git1", "6.3.42134", "6.3.4", "ok"),
        ("2.11.0a0+git1", "6.3.42134", "6.2.4", "wrong"),
        ("2.9.1+rocm6.4", None, "6.3.4", "wrong"),
        ("2.9.1+cpu", None, "6.3.4", "ok"),
        ("2.9.1", None, "6.3.4", "wrong"),
        (None, None, "6.3.4", "missing"),
    ],
)
def test_pytorch_on_gfx906_is_judged_by_the_rocm_it_was_built_for(
    torch: str | None, hip: str | None, rocm: str, state: str
) -> None:
    assert judge_torch("gfx906", rocm, Installed("3.12", torch, hip)).state == state


@pytest.mark.parametrize(
    ("chip", "vllm", "state"),
    [
        ("gfx906", "0.23.1+gfx906", "ok"),
        ("gfx906", "0.18.0+rocm700", "wrong"),
        ("gfx906", "0.1.dev1+gceec3eaf6.rocm644", "unknown"),
        ("gfx906", "0.18.0", "wrong"),
        ("gfx906", "0.32.0+cpu", "wrong"),
        ("gfx1201", "0.18.0+rocm700", "ok"),
        ("gfx1201", "0.18.0", "wrong"),
        ("gfx1031", "0.18.0+rocm700", "unknown"),
        (None, "0.32.0+cpu", "ok"),
    ],
)
def test_vllm_is_judged_for_the_chip(chip: str | None, vllm: str, state: str) -> None:
    judged = judge_vllm(chip, Installed("3.12", vllm=vllm), in_container=False)
    assert judged.state == state


def test_upstream_vllm_on_gfx906_is_answered_with_an_image_that_runs() -> None:
    judged = judge_vllm("gfx906", UPSTREAM, in_container=False)
    assert "aiinfos/vllm-gfx906-mobydick" in judged.repair


def test_upstreams_triton_on_gfx906_is_doubted() -> None:
    assert judge_triton("gfx906", UPSTREAM).state == "unknown"
    assert judge_triton("gfx1201", UPSTREAM).state == "ok"


def test_a_container_engine_stands_in_for_vllm_in_python(tmp_path: Path) -> None:
    box_of(tmp_path)
    assert not ready_for_cards(examine(host_of(tmp_path, BARE)))
    podman = host_of(tmp_path, BARE, which={"podman": "/usr/bin/podman"}.get)
    assert ready_for_cards(examine(podman))


def test_docker_that_is_closed_to_this_user_is_no_container_engine(tmp_path: Path) -> None:
    write(tmp_path / "var/run/docker.sock", "")
    docker = {"docker": "/usr/bin/docker"}.get
    assert container_engine(host_of(tmp_path, which=docker)).said == "docker"
    closed = host_of(tmp_path, which=docker, may_open=lambda _: False)
    assert container_engine(closed).state == "wrong"


def test_a_processors_own_graphics_are_not_what_software_is_judged_for(tmp_path: Path) -> None:
    box_of(tmp_path, cards=2)
    write(
        tmp_path / "sys/class/kfd/kfd/topology/nodes/2/properties",
        "gfx_target_version 100306\ndrm_render_minor 129",
    )
    assert found("ROCm", host_of(tmp_path)).said == "6.3.4-76, which serves gfx906"


@pytest.mark.parametrize(
    ("version", "expected"), [("6.3.4-76", (6, 3, 4)), ("7.0", (7, 0)), ("git", ())]
)
def test_a_version_is_read_by_its_leading_numbers(version: str, expected: tuple[int, ...]) -> None:
    assert numbers(version) == expected


# --------------------------------------------------------------------------------------
# Another Python


def test_an_interpreter_tells_what_it_has() -> None:
    assert ask(Path(sys.executable)).python == ".".join(map(str, sys.version_info[:3]))


def test_the_rocm_of_a_pytorch_is_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "torch/__init__.py", "raise SystemExit('imported')")
    write(tmp_path / "torch/version.py", "cuda: str | None = None\nhip: str | None = '6.3.42134-a'")
    write(tmp_path / "torch-2.11.0.dist-info/METADATA", "Name: torch\nVersion: 2.11.0a0+git1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    installed = ask(Path(sys.executable))
    assert (installed.torch, installed.hip) == ("2.11.0a0+git1", "6.3.42134")


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("text", "why"),
    [("exit 3", "status 3"), ("echo hello", "does not answer"), ("exec sleep 60", "within 0 s")],
)
def test_what_is_no_python_is_refused_in_one_line(tmp_path: Path, text: str, why: str) -> None:
    limit_s = 0.2 if "sleep" in text else 20.0
    with pytest.raises(InputError, match=why) as raised:
        ask(script(tmp_path / "python", text), limit_s)
    assert "\n" not in str(raised.value)


def test_an_interpreter_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--python .*nowhere: cannot be run"):
        ask(tmp_path / "nowhere")


# --------------------------------------------------------------------------------------
# Room


def test_too_little_memory_for_a_worker_a_card_is_doubted(tmp_path: Path) -> None:
    box_of(tmp_path, cards=4)
    write(tmp_path / "proc/meminfo", "MemTotal: 33554432 kB\nMemAvailable: 31457280 kB")
    memory = found("memory", host_of(tmp_path))
    assert memory.state == "unknown"
    assert memory.said.startswith("30.0 GiB available of 32.0; one vLLM worker")


def test_a_folder_for_weights_that_is_not_made_yet_is_on_its_parents_disk(tmp_path: Path) -> None:
    assert disk(host_of(tmp_path, weights=tmp_path / "models/hub"), []).state == "ok"


def test_a_port_that_is_listened_on_is_found_by_the_kernels_table(tmp_path: Path) -> None:
    bare_box(tmp_path)
    rows = ["0: 0100007F:1F90 00000000:0000 0A 0", "1: 0100007F:1F91 0100007F:99 01 0"]
    write(tmp_path / "proc/net/tcp", "\n".join(["  sl  local_address", *rows]))
    host = host_of(tmp_path, ports=(8080, 8081))
    assert [found(f"port {port}", host).state for port in host.ports] == ["wrong", "ok"]


# --------------------------------------------------------------------------------------
# The command

Doctor = Callable[..., int]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """`viisim doctor ARGUMENTS`: its exit status."""

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["viisim", "doctor", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


def test_without_cards_it_says_what_runs_all_the_same(
    tmp_path: Path, doctor: Doctor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor("--root", tmp_path) == 0
    assert "viisim deploy experiments/least_loaded.yaml" in capsys.readouterr().out


def test_strictly_a_machine_without_cards_fails(tmp_path: Path, doctor: Doctor) -> None:
    assert doctor("--root", tmp_path, "--strict") == 1


def test_json_tells_the_same_to_programs(
    tmp_path: Path, doctor: Doctor, capsys: pytest.CaptureFixture[str]
) -> None:
    box_of(tmp_path)
    doctor("--root", tmp_path, "--json")
    told = json.loads(capsys.readouterr().out)
    rocm = next(one for one in told["findings"] if one["subject"] == "ROCm")
    assert rocm["said"] == "6.3.4-76, which serves gfx906"
    assert isinstance(told["ready_for_cards"], bool)


def test_a_missing_interpreter_is_an_error_of_the_user(
    tmp_path: Path, doctor: Doctor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor("--root", tmp_path, "--python", tmp_path / "nowhere") == 2
    assert capsys.readouterr().err.startswith("error: --python")
