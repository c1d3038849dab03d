"""What has to be known of the host's processors before their error reports can be read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pgofflined.core.frames import PAGE_SHIFT, Mfn

# IA32_MCG_CAP, Intel SDM volume 3, "IA32_MCG_CAP MSR": corrected-error interrupt and count, and
# software error recovery, which also defines what MCi_MISC says of an address.
_MCG_CMCI_P: Final = 1 << 10
_MCG_SER_P: Final = 1 << 24

# AMD's first 64-bit processors, whose northbridge codes its errors in its own way.
_K8_FAMILY: Final = 0xF

# First AMD family whose banks are scalable (SMCA) and whose memory controllers report
# normalised addresses; Hygon's families start behind it.
_FIRST_SMCA_FAMILY: Final = 0x17


class CpuVendor(StrEnum):
    """Whose rules the machine-check banks follow."""

    INTEL = "intel"
    AMD = "amd"
    OTHER = "other"


# vendor_id strings of CPUID leaf 0.  Hygon's processors are AMD's in all that matters here.
_VENDOR_IDS: Final = {
    "GenuineIntel": CpuVendor.INTEL,
    "AuthenticAMD": CpuVendor.AMD,
    "HygonGenuine": CpuVendor.AMD,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The processors, their address width and the host's last frame.

    ``physical_bits`` is MAXPHYADDR as the kernel reports it, without key-id bits of memory
    encryption.
    """

    vendor: CpuVendor
    family: int
    physical_bits: int
    max_mfn: Mfn

    def __post_init__(self) -> None:
        if not PAGE_SHIFT < self.physical_bits <= 52:
            raise ValueError(f"{self.physical_bits} physical address bits: 13 to 52 are possible")

    @property
    def address_mask(self) -> int:
        """The bits of a machine-check address that are address."""
        return (1 << self.physical_bits) - 1

    @property
    def has_legacy_northbridge(self) -> bool:
        """Whether AMD's bank 4 is the northbridge, with the DRAM errors and plain addresses."""
        return self.vendor is CpuVendor.AMD and _K8_FAMILY <= self.family < _FIRST_SMCA_FAMILY

    @property
    def is_k8(self) -> bool:
        """Whether these are AMD's processors of family 0Fh."""
        return self.vendor is CpuVendor.AMD and self.family == _K8_FAMILY


def counts_corrected_errors(mcg_cap: int | None) -> bool:
    """Whether MCi_STATUS[52:38] counts corrected errors; assumed where MCG_CAP is not known.

    Every Intel server processor since 2008 counts; where MCG_CAP says otherwise the bits are
    model-specific and mean nothing here.
    """
    return mcg_cap is None or bool(mcg_cap & _MCG_CMCI_P)


def recovers_from_errors(mcg_cap: int | None) -> bool:
    """Whether an Intel processor has software error recovery; assumed where MCG_CAP is not known.

    Without it (Nehalem, Westmere) bits 56 and 55 of MCi_STATUS and the low bits of MCi_MISC are
    model-specific: no error is "signalled", and a valid address is a physical one.
    """
    return mcg_cap is None or bool(mcg_cap & _MCG_SER_P)


def read_cpuinfo(untrusted_text: str, *, max_mfn: Mfn) -> Machine:
    """What /proc/cpuinfo says of the first processor.

    Raises ValueError, naming the line, where one that is needed is missing or odd.
    """
    vendor_id = _cpuinfo_value(untrusted_text, "vendor_id", r"(\S.*?)")
    family = _cpuinfo_value(untrusted_text, "cpu family", r"(\d{1,5})")
    bits = _cpuinfo_value(untrusted_text, "address sizes", r"(\d{1,3}) bits physical.*")
    return Machine(
        vendor=_VENDOR_IDS.get(vendor_id, CpuVendor.OTHER),
        family=int(family),
        physical_bits=int(bits),
        max_mfn=max_mfn,
    )


def _cpuinfo_value(text: str, key: str, pattern: str) -> str:
    found = re.search(rf"^{key}[ \t]*:[ \t]*{pattern}[ \t]*$", text, re.ASCII | re.MULTILINE)
    if not found:
        raise ValueError(f"/proc/cpuinfo has no usable line {key!r}")
    return found[1]
