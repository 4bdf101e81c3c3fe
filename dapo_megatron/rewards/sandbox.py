"""Programs nobody vouches for, each in a process of its own that can compute and answer, and nothing else.

What holds, with root or without, enforced by the kernel (a filter of system calls, seccomp): a program opens no file,
starts no process, has no socket, signals nobody, reads no other process's memory and changes no limit. What it has are
its input, its output, the standard library as far as `sandbox_child.LOADED` names it, threads, clocks and random
numbers; environment and folder are empty. CPU time, address space, output, open files and wall time are limited; the
process is killed in the end, and with it all its threads. It dies with the worker that started it.

Beyond that, where the run is root: a user that owns nothing and an empty root folder, for programs that find a hole in
the kernel's filter; with root or user namespaces: no network interface. Without either this second line is missing.
Not guaranteed: that a program uses no cores beyond its share while it runs (threads), nor anything against a kernel
with faults.
"""

import json
import math
import os
import platform
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_megatron.rewards.sandbox_child import ARCHITECTURES

START_LIMIT_S = 30.0
END_LIMIT_S = 10.0
MOST_OPEN_FILES = 64
_CHILD = Path(__file__).with_name("sandbox_child.py")

# Says "confined" where none of it works. ctypes lies in memory, so that is what a hostile program has too.
_PROBE = """
import os, sys
def refused(what):
    try: what()
    except (PermissionError, BlockingIOError): return True
import signal, _socket
checks = [lambda: open("/"), lambda: os.listdir("."), lambda: os.mkdir("x"), os.fork, _socket.socket,
          lambda: os.kill(os.getppid(), 0), lambda: os.execv("/bin/true", ["true"])]
sys.stdout.write("confined" if all(map(refused, checks)) else "open")
"""


@dataclass(frozen=True)
class Ran:
    """output: what a program wrote, None if it ended badly, late or wrote too much. late: it exceeded the wall time."""

    output: bytes | None
    late: bool = False


class Sandbox:
    """Runs one program at a time; the process that it forks them from starts with it.

    Raises:
        OSError: that process does not start, as on systems other than Linux on x86_64 and aarch64.
    """

    def __init__(self) -> None:
        if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
            raise OSError(f"programs can be confined on Linux on {' and '.join(ARCHITECTURES)} only")
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_CHILD), str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        try:
            self._receive(1, START_LIMIT_S)
        except BaseException:
            self.close()
            raise

    def run(
        self,
        program: str,
        *,
        stdin: str = "",
        function: str | None = None,
        arguments: Any = (),
        time_limit_s: float,
        memory_limit_mib: int,
        most_output: int,
    ) -> Ran:
        """Run `program` with `stdin`, or call `function` of it with `arguments` (JSON values) for the JSON it returns.

        Args:
            time_limit_s: wall time in seconds.
            memory_limit_mib: address space, the interpreter's 30 MiB or so included.
            most_output: bytes.

        Raises:
            OSError: the process that forks is gone; use another sandbox.
        """
        limits = {
            "RLIMIT_CPU": math.ceil(time_limit_s) + 1,
            "RLIMIT_AS": memory_limit_mib * 2**20,
            "RLIMIT_FSIZE": 0,
            "RLIMIT_NOFILE": MOST_OPEN_FILES,
            "RLIMIT_CORE": 0,
        }
        order = {"program": program, "function": function, "arguments": arguments, "limits": limits}
        output, theirs = os.pipe()
        try:
            files = [_file_with(json.dumps(order).encode()), _file_with(stdin.encode(errors="replace")), theirs]
            try:
                socket.send_fds(self._control, [b"s"], files)
            finally:
                for file in files:
                    os.close(file)
            (process,) = struct.unpack("<i", self._receive(4, END_LIMIT_S))
            try:
                ran = _collect(process, output, time.monotonic() + time_limit_s, most_output)
            finally:
                os.kill(process, signal.SIGKILL)  # nobody has reaped it yet: the number is still its own
                self._control.sendall(b"e")
                (status,) = struct.unpack("<i", self._receive(4, END_LIMIT_S))
        finally:
            os.close(output)
        return ran if status == 0 or ran.output is None else Ran(None)

    def check(self) -> None:
        """Try what must not work.

        Raises:
            OSError: this kernel does not confine programs.
        """
        ran = self.run(_PROBE, time_limit_s=START_LIMIT_S, memory_limit_mib=256, most_output=100)
        if ran.output != b"confined":
            raise OSError("the kernel does not confine programs (seccomp filters)")

    def close(self) -> None:
        """End the process; a second call does nothing."""
        self._control.close()
        self._process.kill()
        self._process.wait(END_LIMIT_S)

    def _receive(self, count: int, limit_s: float) -> bytes:
        self._control.settimeout(limit_s)
        content = b""
        while len(content) < count:
            piece = self._control.recv(count - len(content))
            if not piece:
                raise OSError("the process that runs programs ended")
            content += piece
        return content


def _collect(process: int, output: int, deadline: float, most: int) -> Ran:
    """What a process writes until it ends."""
    content = bytearray()
    ended = os.pidfd_open(process)
    try:
        poll = select.poll()
        poll.register(output, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(math.ceil(1000 * left)):
                return Ran(None, late=True)
            piece = os.read(output, 65536)
            if not piece:
                break
            content += piece
            if len(content) > most:
                return Ran(None)
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        if not poll.poll(max(1, math.ceil(1000 * (deadline - time.monotonic())))):
            return Ran(None, late=True)
    finally:
        os.close(ended)
    return Ran(bytes(content))


def _file_with(content: bytes) -> int:
    """A file in memory, read from its start."""
    file = os.memfd_create("dapo-code", os.MFD_CLOEXEC)
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]
    os.lseek(file, 0, os.SEEK_SET)
    return file
