"""What ctypes believes of Xen's interface is what a C compiler makes of the public headers."""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest

import pgofflined.xen.abi
from pgofflined.core import domains, frames, offline, pages, telemetry
from pgofflined.xen.abi.interface import INTERFACE_VERSIONS, Interface
from pgofflined.xen.abi.structure import AbiStructure

from .headers import RELEASES, Release, headers

# No packaged header has these two modules' contents; test_linux.py and test_interface.py do.
ELSEWHERE = {"mcelog", "interface", "structure"}
# Facts of Xen's source that its headers do not state.
NO_C_NAME = {"EXTRAVERSION_SIZE", "GETPAGEFRAMEINFO3_MAX"}

INCLUDES = """
#define __XEN_TOOLS__ 1
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <xen/xen.h>
#include <xen/arch-x86/xen-mca.h>
#include <xen/domctl.h>
#include <xen/grant_table.h>
#include <xen/hvm/hvm_op.h>
#include <xen/hvm/params.h>
#include <xen/memory.h>
#include <xen/sched.h>
#include <xen/sysctl.h>
#include <xen/version.h>
"""

CORE_CONSTANTS: Mapping[str, int] = {
    **{
        f"DOMID_{name}": getattr(frames, f"DOMID_{name}")
        for name in ("FIRST_RESERVED", "SELF", "IO", "XEN", "COW", "INVALID")
    },
    "XEN_DOMINF_dying": domains.DOMINF_DYING,
    "XEN_DOMINF_hvm_guest": domains.DOMINF_HVM,
    "XEN_DOMINF_shutdown": domains.DOMINF_SHUTDOWN,
    "XEN_DOMINF_paused": domains.DOMINF_PAUSED,
    "XEN_X86_EMU_LAPIC": domains.EMU_LAPIC,
    **{
        f"SHUTDOWN_{reason.name.lower()}": reason.value
        for reason in domains.ShutdownReason
        if reason is not domains.ShutdownReason.UNKNOWN
    },
    "PG_OFFLINE_STATUS_OFFLINED": offline.OfflineState.OFFLINED.value,
    "PG_OFFLINE_STATUS_ONLINE": offline.OfflineState.ONLINE_EXPLICIT.value,
    "PG_OFFLINE_STATUS_OFFLINE_PENDING": offline.OfflineState.OFFLINE_PENDING.value,
    "PG_OFFLINE_STATUS_BROKEN": offline.OfflineState.BROKEN.value,
    **{f"PG_OFFLINE_{flag.name}": flag.value for flag in offline.OfflineFlag},
    # PG_ONLINE_INVALID is ours: the header has it for offlining only.
    **{
        f"PG_ONLINE_{flag.name}": flag.value
        for flag in offline.OnlineFlag
        if flag is not offline.OnlineFlag.INVALID
    },
    "PG_OFFLINE_OWNER_SHIFT": 16,
    **{
        f"MC_FLAG_{name}": getattr(telemetry, f"MC_FLAG_{name}")
        for name in ("POLLED", "CMCI", "MCE")
    },
    "XEN_DOMCTL_PFINFO_LTAB_SHIFT": pages.PFINFO_TYPE_SHIFT,
    "XEN_DOMCTL_PFINFO_LTAB_MASK": pages.PFINFO_TYPE_MASK,
    "XEN_DOMCTL_PFINFO_LTABTYPE_MASK": pages.PFINFO_LTAB_TYPE_MASK,
    "XEN_DOMCTL_PFINFO_LPINTAB": pages.PFINFO_PINNED,
    "XEN_DOMCTL_PFINFO_BROKEN": pages.PFINFO_BROKEN,
    "XEN_DOMCTL_PFINFO_XALLOC": pages.PFINFO_XALLOC,
    "XEN_DOMCTL_PFINFO_XTAB": pages.PFINFO_XTAB,
}

GRANT_ENTRIES: Mapping[str, int] = {
    "sizeof(union grant_entry_v2)": 16,
    "offsetof(union grant_entry_v2, hdr.flags)": 0,
    "offsetof(union grant_entry_v2, full_page.frame)": 8,
    "offsetof(union grant_entry_v2, sub_page.frame)": 8,
    "sizeof(grant_status_t)": 2,
    "sizeof(xen_extraversion_t)": 16,
}


def abi_modules() -> Iterator[ModuleType]:
    for found in pkgutil.iter_modules(pgofflined.xen.abi.__path__):
        if found.name not in ELSEWHERE:
            yield importlib.import_module(f"pgofflined.xen.abi.{found.name}")


def constants() -> dict[str, int]:
    """C expression to Python's value, of every constant in the mirror and of the core's."""
    found = dict(CORE_CONSTANTS)
    for module in abi_modules():
        for name, value in vars(module).items():
            if isinstance(value, int) and not name.startswith("_") and name not in NO_C_NAME:
                found[f"__{name}" if name.startswith("HYPERVISOR_") else name] = value
    return found


def structures(release: Release) -> list[type[AbiStructure]]:
    """The mirrored structures that are right for a release."""
    interface = Interface(
        domctl=INTERFACE_VERSIONS[release.xen][0], sysctl=INTERFACE_VERSIONS[release.xen][1]
    )
    chosen = {interface.domain_info, interface.physinfo}
    versioned = {
        kind
        for domctl in range(0x12, 0x19)
        for sysctl in range(0x13, 0x17)
        for kind in (
            Interface(domctl=domctl, sysctl=sysctl).domain_info,
            Interface(domctl=domctl, sysctl=sysctl).physinfo,
        )
    }
    everything = {
        value
        for module in abi_modules()
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, AbiStructure) and value is not AbiStructure
    }
    wanted = (everything - versioned) | chosen
    return sorted(wanted, key=lambda kind: kind.__name__)


def structure_facts(kind: type[AbiStructure]) -> dict[str, int]:
    """C expression to Python's value, for size and offsets."""
    facts = {f"sizeof({kind.c_name})": ctypes.sizeof(kind)}
    for field in kind._fields_:
        name = field[0]
        if not name.startswith("_pad"):
            descriptor = getattr(kind, name)
            c_field = name.rstrip("_")
            facts[f"offsetof({kind.c_name}, {c_field})"] = descriptor.offset
            facts[f"sizeof((({kind.c_name} *)0)->{c_field})"] = descriptor.size
    return facts


def expected(release: Release) -> dict[str, int]:
    facts = {**constants(), **GRANT_ENTRIES}
    facts["XEN_DOMCTL_INTERFACE_VERSION"], facts["XEN_SYSCTL_INTERFACE_VERSION"] = (
        INTERFACE_VERSIONS[release.xen]
    )
    for kind in structures(release):
        facts.update(structure_facts(kind))
    return facts


def compiled(expressions: list[str], include: Path, directory: Path) -> list[int]:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.fail("no C compiler: install gcc, the ABI cannot be checked without")
    prints = "\n".join(f'    printf("%llu\\n", (unsigned long long)({e}));' for e in expressions)
    source = directory / "facts.c"
    source.write_text(f"{INCLUDES}\nint main(void)\n{{\n{prints}\n    return 0;\n}}\n")
    program = directory / "facts"
    built = subprocess.run(
        [compiler, "-std=gnu11", "-Wall", "-Werror", f"-I{include}", "-o", program, source],
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode:
        pytest.fail(f"the headers in {include} do not compile:\n{built.stderr[-4000:]}")
    ran = subprocess.run([program], capture_output=True, text=True, check=True)
    return [int(line) for line in ran.stdout.split()]


@pytest.mark.parametrize("release", RELEASES, ids=str)
def test_mirror_agrees_with_the_headers(release: Release, tmp_path: Path) -> None:
    include = headers(release)
    facts = expected(release)
    values = compiled(list(facts), include, tmp_path)
    differing = {
        expression: f"headers {actual:#x}, ours {ours:#x}"
        for (expression, ours), actual in zip(facts.items(), values, strict=True)
        if actual != ours & 0xFFFF_FFFF_FFFF_FFFF
    }
    assert not differing


def test_the_comparison_is_not_empty() -> None:
    facts = expected(RELEASES[-1])
    assert len(facts) > 250
    for expression in (
        "__HYPERVISOR_arch_0",
        "XEN_SYSCTL_page_offline_op",
        "offsetof(struct xen_memory_exchange, in)",
        "sizeof(struct vcpu_guest_context)",
    ):
        assert expression in facts
