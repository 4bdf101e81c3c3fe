"""Where programs under test run: `python -I -S sandbox_child.py FD PARENT`. Imports the standard library alone.

One process with the standard library loaded waits on the socket FD. For each test it forks, hands the child three
files (the order, standard input, the output) without looking into them, and reaps the child when told to. The child
gives up every right for good, then runs the program. In call mode the JSON of what the function returned goes to the
output; in stdin mode the output is standard output. What is expected is known to neither process.
"""

import atexit
import builtins
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import platform
import resource
import signal
import socket
import struct
import sys
import tempfile
import threading
import types

# Programs find these loaded: once confined they open no file, and so import nothing else.
LOADED = """
    __future__ abc argparse array ast base64 binascii bisect builtins calendar cmath cmd codecs collections
    collections.abc concurrent.futures concurrent.futures.thread contextlib contextvars copy csv dataclasses datetime
    decimal difflib doctest enum errno fileinput fractions functools gc getopt graphlib hashlib heapq hmac html inspect
    io ipaddress itertools json keyword locale logging math numbers operator optparse os pathlib pickle platform pprint
    queue random re reprlib sched secrets shlex signal statistics string struct sys textwrap threading time timeit
    traceback tracemalloc types typing unicodedata unittest urllib.parse uuid warnings weakref zlib zoneinfo _strptime
    encodings.ascii encodings.hex_codec encodings.idna encodings.latin_1 encodings.rot_13 encodings.utf_16
    encodings.utf_8_sig
"""
# Names that programs of call-based sets use without importing them.
PREAMBLE = """
import bisect, collections, copy, datetime, functools, heapq, itertools, json, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import ceil, comb, floor, gcd, inf, lcm, sqrt
from typing import *
"""
MOST_THREADS = 64
FIRST_UID, NOBODY = 1_600_000_000, 65534  # from FIRST_UID on: users that no machine has

CLONE_NEWUSER, CLONE_NEWIPC, CLONE_NEWNET = 0x10000000, 0x08000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

# System calls left to a program: computing, memory, clocks, its own threads, reading and writing what is open.
CALLS = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
        "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "readv": 19,
        "writev": 20, "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33,
        "nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98,
        "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "sigaltstack": 131,
        "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204, "restart_syscall": 219,
        "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "pselect6": 270,
        "ppoll": 271, "set_robust_list": 273, "dup3": 292, "getrandom": 318, "rseq": 334,
    },
    "aarch64": {
        "dup": 23, "dup3": 24, "close": 57, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66,
        "pread64": 67, "pselect6": 72, "ppoll": 73, "fstat": 80, "exit": 93, "exit_group": 94, "futex": 98,
        "set_robust_list": 99, "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115,
        "sched_getaffinity": 123, "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134,
        "rt_sigprocmask": 135, "rt_sigreturn": 139, "times": 153, "uname": 160, "getrlimit": 163, "getrusage": 165,
        "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176,
        "getegid": 177, "gettid": 178, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226,
        "madvise": 233, "getrandom": 278, "rseq": 293,
    },
}  # fmt: skip
# Of these only calls with exactly such arguments (number of the argument → value).
RESTRICTED = {
    "x86_64": {"newfstatat": 262, "ioctl": 16, "fcntl": 72, "clone": 56, "prlimit64": 302},
    "aarch64": {"newfstatat": 79, "ioctl": 29, "fcntl": 25, "clone": 220, "prlimit64": 261},
}
FORMS = {
    "newfstatat": [{3: 0x1000}],  # AT_EMPTY_PATH: of an open file
    "ioctl": [{1: 0x5401}],  # TCGETS: is it a terminal?
    "fcntl": [{1: 1}, {1: 3}, {1: 1030}],  # F_GETFD, F_GETFL, F_DUPFD_CLOEXEC
    "clone": [{0: 0x3D0F00}, {0: 0x7D0F00}],  # a thread, as glibc and musl make one
    "prlimit64": [{0: 0, 2: 0}],  # what are my limits?
}
CLONE3 = 435  # the same on both; told to be missing, so that libraries fall back to clone
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALLOW, _DENY, _KILL = 0x7FFF0000, 0x00050000, 0x80000000


def seccomp_filter(machine: str) -> bytes:
    """The BPF program that lets CALLS and FORMS pass and answers all else with EPERM."""

    def load(offset: int) -> bytes:
        return struct.pack("<HBBI", 0x20, 0, 0, offset)

    def unless_equal(value: int, skip: int) -> bytes:
        return struct.pack("<HBBI", 0x15, 0, skip, value)

    def answer(action: int) -> bytes:
        return struct.pack("<HBBI", 0x06, 0, 0, action)

    # seccomp_data: int nr, u32 arch, u64 instruction pointer, u64 arguments[6]
    program = [load(4), struct.pack("<HBBI", 0x15, 1, 0, ARCHITECTURES[machine]), answer(_KILL), load(0)]
    program += [unless_equal(CLONE3, 1), answer(_DENY | errno.ENOSYS)]
    for number in CALLS[machine].values():
        program += [unless_equal(number, 1), answer(_ALLOW)]
    for name, number in RESTRICTED[machine].items():
        for form in FORMS[name]:
            tests = []
            for argument, value in form.items():
                tests += [(16 + 8 * argument, value), (20 + 8 * argument, 0)]  # low and high half
            program.append(unless_equal(number, 2 * len(tests) + 2))
            for i, (offset, value) in enumerate(tests):
                program += [load(offset), unless_equal(value, 2 * (len(tests) - i - 1) + 1)]
            program += [answer(_ALLOW), load(0)]
    return b"".join([*program, answer(_DENY | errno.EPERM)])


def leave_the_machine(library: ctypes.CDLL) -> None:
    """As far as it is permitted: no network, an empty folder that is gone already as all there is of files.

    The second line of defence; the first is the filter of system calls.
    """
    folder = tempfile.mkdtemp(prefix="dapo-code-")
    os.chdir(folder)
    os.rmdir(folder)
    if os.geteuid():
        library.unshare(CLONE_NEWUSER)
    library.unshare(CLONE_NEWNET)
    library.unshare(CLONE_NEWIPC)
    with contextlib.suppress(OSError):
        os.chroot(".")


def confine(library: ctypes.CDLL, calls: bytes, limits: dict[str, int], uid: int, parent: int) -> None:
    """Give up rights and resources for good, and die with the process `parent`. Raises OSError where the kernel has no
    such filter."""
    changed = False
    for user in (uid, NOBODY) if os.geteuid() == 0 else ():
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        except OSError:
            continue
        changed = True
        break
    # RLIMIT_NPROC counts all processes of a user, so it fits only one that has no others
    limits = limits | ({"RLIMIT_NPROC": MOST_THREADS} if changed and user == uid else {})
    for name, value in limits.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of user resets it
    library.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before
        os._exit(1)
    text = ctypes.create_string_buffer(calls, len(calls))
    program = struct.pack("HxxxxxxP", len(calls) // 8, ctypes.addressof(text))
    if library.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or library.prctl(PR_SET_SECCOMP, 2, program, 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp filter")


def serve(control: socket.socket) -> tuple[int, int, int]:
    """Fork and reap on demand; returns, in each child, its three files."""
    child = 0
    while True:
        word, files, _, _ = socket.recv_fds(control, 1, 3)
        if word == b"s":
            child = os.fork()
            if child == 0:
                return tuple(files)
            for file in files:
                os.close(file)
            control.sendall(struct.pack("<i", child))
        elif word == b"e":
            control.sendall(struct.pack("<i", os.waitpid(child, 0)[1]))
        else:  # the other end is gone
            os._exit(0)


def put_in_place(stdin: int, output: int, devnull: int, *, call: bool) -> int:
    """Files 0, 1 and 2 of a program, all others closed; returns the number under which results are written."""
    stdin, output, devnull = (fcntl.fcntl(file, fcntl.F_DUPFD, 16) for file in (stdin, output, devnull))
    for file, number in ((stdin, 0), (devnull if call else output, 1), (devnull, 2), (output, 3)):
        os.dup2(file, number)
    os.closerange(4 if call else 3, 256)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = open(number, mode, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    return 3 if call else 1


def run(request: dict, result: int) -> int:
    """Run the program of a request, and call its function if there is one; its exit status."""
    call = request["function"] is not None
    module = types.ModuleType("solution" if call else "__main__")
    sys.modules[module.__name__] = module
    sys.argv = ["program.py"]
    sys.setrecursionlimit(50_000)
    stdout = sys.stdout
    try:
        if call:
            exec(PREAMBLE, module.__dict__)
        exec(compile(request["program"], "program.py", "exec", dont_inherit=True), module.__dict__)
        if call:
            write_all(result, json.dumps(called(module, request)).encode())
            return 0
    except SystemExit as stop:
        return 0 if stop.code in (None, 0) and not call else 1
    finally:
        if not call:
            threading._shutdown()
            atexit._run_exitfuncs()
            for stream in (sys.stdout, stdout):
                with contextlib.suppress(Exception):  # the program closed or replaced it
                    stream.flush()
    return 0


def called(module: types.ModuleType, request: dict) -> object:
    """What the method of `Solution`, or the function, of that name returns."""
    name, scope = request["function"], module.__dict__
    # the class first: the preamble has functions of many names
    method = getattr(scope.get("Solution"), name, None)
    function = scope[name] if method is None else getattr(scope["Solution"](), name)
    return function(*request["arguments"])


def write_all(file: int, content: bytes) -> None:
    """Write to a pipe, which may take a piece at a time."""
    while content:
        content = content[os.write(file, content) :]


def main() -> None:
    """Get ready, say so, serve; each child runs one program and ends."""
    control, parent = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    for name in LOADED.split():
        __import__(name)
    builtins.exit = builtins.quit = sys.exit  # as `site` has it, which -S leaves out
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    library.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if os.getppid() != parent:
        return
    calls = seccomp_filter(platform.machine())
    devnull = os.open(os.devnull, os.O_RDWR)
    leave_the_machine(library)
    control.sendall(b"r")
    server = os.getpid()
    order, stdin, output = serve(control)
    status = 1
    try:
        control.close()
        os.setsid()
        with open(order, "rb") as file:
            request = json.load(file)
        result = put_in_place(stdin, output, devnull, call=request["function"] is not None)
        confine(library, calls, request["limits"], FIRST_UID + parent, server)
        status = run(request, result)
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
