"""What the CUDA kernel has of its own: pieces, chunks, compilation, machine code.

What it shares with the other kernels is tested beside them.
"""

import ctypes
import importlib.resources

import cuda_code
import pytest
from slow import slow

ARCHITECTURES = ("sm_90", *slow("sm_75", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120"))
TYPES = {
    "float": "float",
    "double": "double",
    "jbag::cuda::BFloat16": "float",
    "jbag::cuda::Half": "float",
}
WIDTHS = {"float": 4, "double": 2, "jbag::cuda::BFloat16": 8, "jbag::cuda::Half": 8}
RULES = (
    "Sgd",
    "Momentum",
    "Adagrad",
    "RowwiseAdagrad",
    "Adam",
    "RowwiseAdam",
    "RowwiseRmsprop",
    "Ftrl",
)


def kernels():
    """Return the instances with the widest vectors: those that gather rows, others."""
    gathering, others = [], []
    for table, sums in TYPES.items():
        width = WIDTHS[table]
        for ids in ("int", "long long"):
            rows = f"{table}, {width}, {ids}"
            gathering += [
                f"SumPieces<{rows}>",
                f"SumBags<{rows}, {table}>",
                f"ExtremumOfPieces<{rows}, true>",
                f"ExtremumOfBags<{rows}, false>",
                f"Dots<{rows}>",
            ]
        if sums != table:
            gathering.append(f"SumBags<{table}, {width}, int, {sums}>")
            gathering.append(f"SumBags<{sums}, {WIDTHS[sums]}, int, {table}>")
        gathering += [
            f"UpdateRows<{table}, {WIDTHS[sums]}, jbag::cuda::{rule}, false>"
            for rule in RULES
        ]
    gathering.append("UpdateRows<jbag::cuda::BFloat16, 4, jbag::cuda::Adam, true>")
    for integer in ("int", "long long"):
        others += [
            f"CheckBounds<{integer}>",
            f"RepairBounds<{integer}>",
            f"SlotKeys<{integer}>",
            f"WriteSegments<{integer}>",
        ]
    others += ["CountSegments", "AccumulateCounts"]
    return [[f"jbag::cuda::{name}" for name in names] for names in (gathering, others)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code_has_no_spills_and_eight_loads_in_flight(architecture, tmp_path):
    nvrtc = cuda_code.nvidia_file("*/lib/libnvrtc.so.*")
    nvdisasm = cuda_code.nvidia_file("*/bin/nvdisasm")
    library = importlib.resources.files("jbag") / "ops/kernels/libjbag_cuda.so"
    if nvrtc is None or nvdisasm is None:
        pytest.skip("needs nvidia-cuda-nvrtc and nvidia-cuda-nvcc or -nvdisasm")
    if not library.is_file():
        pytest.skip("jbag is not installed")
    read_source = ctypes.CDLL(str(library)).jbag_cuda_source
    read_source.restype = ctypes.c_char_p
    gathering, others = kernels()
    cubin, log, symbols = cuda_code.compile_kernels(
        nvrtc, read_source(), gathering + others, architecture
    )
    path = tmp_path / "jbag.cubin"
    path.write_bytes(cubin)
    codes = cuda_code.read_code(nvdisasm, path, log, symbols)
    assert {name: code for name, code in codes.items() if code.spills} == {}
    few = {name: codes[name] for name in gathering if codes[name].loads_in_flight < 8}
    assert few == {}
