from __future__ import annotations

import pytest

from pgofflined.core.frames import Mfn
from pgofflined.core.machine import CpuVendor, Machine, read_cpuinfo

CPUINFO = """\
processor\t: 0
vendor_id\t: {vendor}
cpu family\t: 6
model\t\t: 85
model name\t: Some processor with 3 bits physical
address sizes\t: 46 bits physical, 48 bits virtual
power management:

processor\t: 1
vendor_id\t: {vendor}
cpu family\t: 99
"""


@pytest.mark.parametrize(
    ("vendor_id", "vendor"),
    [
        ("GenuineIntel", CpuVendor.INTEL),
        ("AuthenticAMD", CpuVendor.AMD),
        ("HygonGenuine", CpuVendor.AMD),
        ("CentaurHauls", CpuVendor.OTHER),
        ("  Shanghai  ", CpuVendor.OTHER),
    ],
)
def test_first_processor_of_cpuinfo_is_read(vendor_id: str, vendor: CpuVendor) -> None:
    machine = read_cpuinfo(CPUINFO.format(vendor=vendor_id), max_mfn=Mfn(5))
    assert machine == Machine(vendor=vendor, family=6, physical_bits=46, max_mfn=Mfn(5))


@pytest.mark.parametrize("missing", ["vendor_id", "cpu family", "address sizes"])
def test_missing_line_of_cpuinfo_is_named(missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        read_cpuinfo(CPUINFO.format(vendor="x").replace(missing, "other"), max_mfn=Mfn(5))


@pytest.mark.parametrize("bits", [0, 12, 53, 64])
def test_impossible_address_width_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="physical address bits"):
        Machine(vendor=CpuVendor.INTEL, family=6, physical_bits=bits, max_mfn=Mfn(5))


@pytest.mark.parametrize("bits", [13, 46, 52])
def test_every_bit_of_an_address_counts(bits: int) -> None:
    machine = Machine(vendor=CpuVendor.INTEL, family=6, physical_bits=bits, max_mfn=Mfn(5))
    assert machine.address_mask == sum(1 << bit for bit in range(bits))
