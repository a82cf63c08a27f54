"""What compiled programs send between devices."""

import math
import re

COLLECTIVES = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
SIZES = {"pred": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}


def collectives(text):
    """Yield the name of each collective operation, and the bytes of its results."""
    pattern = rf"= (.*?) ({COLLECTIVES})(-start)?\("
    for line in text.splitlines():
        if found := re.search(pattern, line):
            shapes, name, is_asynchronous = found.groups()
            sizes = [
                SIZES[dtype] * math.prod(map(int, filter(None, shape.split(","))))
                for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
            ]
            # These return their operands, too, and the last one two words of context.
            if is_asynchronous and name == "collective-permute":
                sizes = sizes[1:2]
            if is_asynchronous and name == "all-gather":
                sizes = sizes[len(sizes) // 2 :]
            yield name, sum(sizes)


def bytes_sent(compiled, devices):
    """Return the bytes that each device sends to others."""
    # Of its results, and there and back for a sum, but for what stays.
    times = {"all-reduce": 2, "reduce-scatter": devices}
    sent = sum(
        times.get(name, 1) * size for name, size in collectives(compiled.as_text())
    )
    return sent * (devices - 1) / devices
