"""The CPUs next to a PCI device, from a copy of the kernel's files."""

from __future__ import annotations

from pathlib import Path

from launcher.worker.ranks.numa import cpus_near


def test_the_cpus_next_to_a_gpu_are_those_of_its_numa_node(tmp_path: Path) -> None:
    for address, node in (("0000:3b:00.0", 1), ("0000:5e:00.0", -1)):
        device = tmp_path / "bus/pci/devices" / address
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")
    folder = tmp_path / "devices/system/node/node1"
    folder.mkdir(parents=True)
    (folder / "cpulist").write_text("4-6,12\n")
    assert cpus_near("0000:3b:00.0", tmp_path) == {4, 5, 6, 12}
    # A machine that does not say, as most virtual ones.
    assert cpus_near("0000:5e:00.0", tmp_path) == set()
    assert cpus_near("0000:aa:00.0", tmp_path) == set()
