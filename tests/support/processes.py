"""Processes that a test starts, and ends in any case."""

import socket
import subprocess
import sys
import tempfile
import time


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Processes:
    """Processes that are started, and in any case ended; what they print is kept."""

    def __init__(self, commands):
        self.files = [tempfile.TemporaryFile("w+") for _ in commands]  # noqa: SIM115 (closed on leaving)
        self.all = [
            subprocess.Popen(
                [sys.executable, "-W", "error", *map(str, command)],
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for command, file in zip(commands, self.files, strict=True)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for one, file in zip(self.all, self.files, strict=True):
            one.kill()
            one.wait()
            file.close()

    def wait(self, number, seconds):
        """Return the exit code of one of them, None if it goes on after that time."""
        try:
            return self.all[number].wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def output(self, number):
        """Return what one of them has printed."""
        self.files[number].seek(0)
        return self.files[number].read()


def succeed(commands, seconds=300):
    """Run all at once, and return what they print."""
    end = time.monotonic() + seconds
    with Processes(commands) as processes:
        numbers = range(len(commands))
        codes = [processes.wait(i, max(0, end - time.monotonic())) for i in numbers]
        output = [processes.output(i) for i in numbers]
    assert codes == [0] * len(commands), "\n\n".join(output)
    return output
