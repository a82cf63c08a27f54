"""Machine code of the CUDA kernels: compiled by NVRTC, read without a GPU."""

import ctypes
import dataclasses
import importlib.util
import pathlib
import re
import subprocess

WIDE_LOAD = re.compile(r"LDG\.E\.(64|128)")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?);")


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel's registers, bytes of spills, and wide loads in flight of a thread."""

    registers: int
    spills: int
    loads_in_flight: int


def nvidia_file(pattern):
    """Return a file of NVIDIA's packages, or None."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(pathlib.Path(folder).glob(pattern), reverse=True):
            return path
    return None


def compile_kernels(nvrtc, source, names, architecture):
    """Return the machine code of the named kernels, the compiler's log and symbols."""
    library = ctypes.CDLL(str(nvrtc))
    program = ctypes.c_void_p()

    def check(error, name):
        if error:
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"{name}: error {error}: {log.value.decode()}")

    def call(name, *arguments):
        check(getattr(library, name)(*arguments), name)

    def text(kind):
        size = ctypes.c_size_t()
        call(f"nvrtcGet{kind}Size", program, ctypes.byref(size))
        out = ctypes.create_string_buffer(size.value)
        call(f"nvrtcGet{kind}", program, out)
        return out.raw

    call("nvrtcCreateProgram", ctypes.byref(program), source, b"", 0, None, None)
    try:
        for name in names:
            call("nvrtcAddNameExpression", program, name.encode())
        options = [
            f"--gpu-architecture={architecture}".encode(),
            b"--std=c++17",
            b"--ptxas-options=-v",
        ]
        array = (ctypes.c_char_p * len(options))(*options)
        call("nvrtcCompileProgram", program, len(options), array)
        symbols = {}
        for name in names:
            symbol = ctypes.c_char_p()
            call("nvrtcGetLoweredName", program, name.encode(), ctypes.byref(symbol))
            symbols[name] = symbol.value.decode()
        return text("CUBIN"), text("ProgramLog").decode(errors="replace"), symbols
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def read_code(nvdisasm, cubin, log, symbols):
    """Return the `Code` of each kernel, from a file of machine code and the log."""
    listing = subprocess.run(
        [str(nvdisasm), "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    sections = dict(
        re.findall(r"^\.text\.(\S+):\n(.*?)(?=^//-|\Z)", listing, re.M | re.S)
    )
    codes = {}
    for name, symbol in symbols.items():
        (used,) = re.findall(
            rf"Compiling entry function '{symbol}'.*?"
            r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
            log,
            re.S,
        )
        stores, loads, registers = map(int, used)
        codes[name] = Code(registers, stores + loads, loads_in_flight(sections[symbol]))
    return codes


def loads_in_flight(section):
    """Return the most wide loads that are issued before an instruction needs one."""
    most = flight = 0
    pending = set()
    for line in section.splitlines():
        match = INSTRUCTION.search(line)
        if match is None:
            if line.startswith(".L_"):
                pending, flight = set(), 0
            continue
        operation, operands = match.groups()
        registers = [int(r) for r in re.findall(r"\bR(\d+)\b", operands)]
        is_load = WIDE_LOAD.match(operation) is not None
        # An address takes two registers, of which one is named; stores name no result.
        read = registers if operation.startswith("ST") else registers[1:]
        if pending & ({*read} | ({r + 1 for r in read} if is_load else set())):
            pending, flight = set(), 0
        if is_load:
            size = 4 if ".128" in operation else 2
            pending |= set(range(registers[0], registers[0] + size))
            flight += 1
            most = max(most, flight)
    return most
