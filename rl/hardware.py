"""The machines a run has or would have: how many GPUs, how large, how fast, and what connects them."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30

PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}
"""Dense bf16 tensor-core operations a second, by a part of the device's name, from NVIDIA's data sheets."""

NVLINK_BYTES_PER_S = 150e9
"""What a broadcast inside a node is taken to reach: a third of the 450 GB/s that NVLink 4 has in one direction."""
NETWORK_BYTES_PER_S = 25e9
"""The same between nodes: half of a 400 Gb/s adapter."""
LOCAL_BYTES_PER_S = 1000e9
"""The same within one GPU: a copy reads and writes, at 4.8 TB/s of memory on an H200 and less on others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """GPUs of one kind, evenly spread over nodes."""

    num_gpus: int
    num_nodes: int = 1
    gpu_bytes: int = 80 * GIB  # of one GPU
    gpu_name: str = ""
    host_bytes: int | None = None  # memory of one node; None where nobody has said

    @property
    def gpus_per_node(self) -> int:
        return -(-self.num_gpus // self.num_nodes)

    @property
    def broadcast_bytes_per_s(self) -> float:
        """How fast weights reach other GPUs: the slowest connection on the way decides."""
        return NVLINK_BYTES_PER_S if self.num_nodes == 1 else NETWORK_BYTES_PER_S


def peak_flops(gpu_name: str) -> float | None:
    """Dense bf16 operations a second of a device such as "NVIDIA H200"; None for one that the table lacks."""
    named = [name for name in PEAK_BF16_FLOPS if all(word in gpu_name for word in name.split())]
    return PEAK_BF16_FLOPS[max(named, key=len)] if named else None


def parse_nvidia_smi(text: str) -> list[tuple[str, int]]:
    """Name and bytes of every GPU in ``nvidia-smi --query-gpu=name,memory.total --format=csv,noheader,nounits``."""
    gpus = []
    for line in text.splitlines():
        name, _, mebibytes = line.rpartition(",")
        if mebibytes.strip().isdigit():
            gpus.append((name.strip(), int(mebibytes) << 20))
    return gpus
