"""What a program in the sandbox can and cannot do; it has ctypes in its memory, and so every system call."""

import os
import platform
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from dapo_megatron.rewards.sandbox import Ran, Sandbox
from dapo_megatron.rewards.sandbox_child import ARCHITECTURES, FIRST_UID

ROOT = Path(__file__).parents[2]
LIMITS = {"time_limit_s": 20.0, "memory_limit_mib": 256, "most_output": 100_000}

pytestmark = pytest.mark.skipif(platform.machine() not in ARCHITECTURES, reason="no filter for this machine")


@pytest.fixture(scope="module")
def sandbox():
    sandbox = Sandbox()
    yield sandbox
    sandbox.close()


def output(sandbox: Sandbox, program: str, **settings) -> str | None:
    ran = sandbox.run(textwrap.dedent(program), **LIMITS | settings)
    return None if ran.output is None else ran.output.decode()


def test_programs_read_compute_and_write(sandbox: Sandbox):
    assert output(sandbox, "print(sum(map(int, input().split())))", stdin="1 2 3\n") == "6\n"
    assert output(sandbox, "import sys\nprint(len(sys.stdin.read()))", stdin="é" * 100_000) == "100000\n"
    assert output(sandbox, "print(open(0).read())", stdin="x") == "x\n"
    assert output(sandbox, "import os\nos.write(1, os.read(0, os.fstat(0).st_size))", stdin="x") == "x"
    assert output(sandbox, "if __name__ == '__main__': print(1); exit()") == "1\n"
    assert output(sandbox, "import sys; sys.exit(3)") is None
    assert output(sandbox, "print(1)\nraise ValueError") is None
    assert output(sandbox, "this is no Python") is None
    assert output(sandbox, "\0") is None
    assert output(sandbox, "print('\ud800')") is None


def test_functions_are_called(sandbox: Sandbox):
    called = {"function": "add", "arguments": [1, 2]}
    assert output(sandbox, "def add(a, b):\n    print('noise')\n    return a + b", **called) == "3"
    method = "class Solution:\n    def add(self, a: int, b: int) -> List[int]:\n        return [*Counter([a, b])]"
    assert output(sandbox, method, **called) == "[1, 2]"
    other = method.replace("add", "gcd")  # a name that the preamble has, too
    assert output(sandbox, other, function="gcd", arguments=[1, 2]) == "[1, 2]"
    assert output(sandbox, "def plus(a, b):\n    return 3", **called) is None
    assert output(sandbox, "def add(a, b):\n    return {3}", **called) is None
    assert output(sandbox, "def add(a, b):\n    exit()", **called) is None


def test_the_library_threads_and_deep_recursion_work(sandbox: Sandbox):
    program = """
        import bisect, collections, datetime, decimal, fractions, functools, heapq, itertools, math, random, re, string
        import statistics, sys, threading, time
        from dataclasses import dataclass
        @dataclass
        class Point:
            x: "int"
        def deep(n): return 0 if n == 0 else 1 + deep(n - 1)
        def main():
            print(deep(20_000), datetime.datetime.strptime("2024-02-29", "%Y-%m-%d").year, Point(3).x)
        sys.setrecursionlimit(10**6)
        threading.stack_size(2**26)
        threading.Thread(target=main).start()
        time.sleep(0.01)
    """
    assert output(sandbox, program) == "20000 2024 3\n"
    program = """
        from __future__ import annotations
        import contextvars, doctest, fileinput, getopt, html, ipaddress, logging, optparse, sched, signal, tracemalloc
        import pickle, unittest
        from concurrent.futures import ThreadPoolExecutor
        from pathlib import PurePosixPath
        from urllib.parse import urlparse
        class Case(unittest.TestCase):
            def test_it(self):
                with self.subTest(), self.assertRaises(ValueError): int("x")
        with ThreadPoolExecutor(2) as pool:
            print(sum(pool.map(int, fileinput.input())), pickle.loads(pickle.dumps([PurePosixPath("a/b").name])))
        print(unittest.main(exit=False).result.wasSuccessful())
    """
    assert output(sandbox, program, stdin="1\n2\n") == "3 ['b']\nTrue\n"
    assert output(sandbox, "try: import numpy\nexcept ImportError: print('none')") == "none\n"


HARM = {
    "reading a file": "open('/etc/passwd')",
    "reading a file by descriptor": "os.open('/etc/passwd', os.O_RDONLY)",
    "reading by a bare system call": "call(libc.open, b'/etc/passwd', 0)",
    "reading by openat2": "system(437, -100, b'/etc/passwd', bytes(24), 24)",
    "reading its own environment": "open('/proc/self/environ')",
    "reading the parent's memory": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "the parent's memory by a system call": "system(310, os.getppid(), 0, 0, 0, 0, 0)",
    "tracing the parent": "call(libc.ptrace, 16, os.getppid(), 0, 0)",
    "listing a folder": "os.listdir('/')",
    "writing outside": "open(TARGET, 'w')",
    "writing here": "open('here', 'w')",
    "a folder": "os.mkdir('here')",
    "removing a file": "os.remove(KEPT)",
    "renaming a file": "os.rename(KEPT, TARGET)",
    "changing rights": "os.chmod(KEPT, 0)",
    "a link": "os.symlink(KEPT, TARGET)",
    "writing into its input": "os.write(0, b'x')",
    "a process": "os.fork()",
    "a process by clone": "system(56, 17, 0, 0, 0, 0)",
    "a process in new namespaces": "system(56, 0x3d0f00 | 0x10000000, 0, 0, 0, 0)",
    "a process by clone3": "system(435, bytes(88), 88)",
    "another program": "os.execv('/bin/sh', ['sh'])",
    "spawning": "os.posix_spawn('/bin/sh', ['sh'], {})",
    "a socket": "socket.socket()",
    "a local socket": "socket.socket(socket.AF_UNIX)",
    "a pair of sockets": "socket.socketpair()",
    "connecting": "socket.create_connection(('127.0.0.1', PORT), 1)",
    "killing the parent": "os.kill(os.getppid(), 9)",
    "killing all": "os.kill(-1, 9)",
    "killing by thread": "system(200, os.getppid(), 9)",
    "killing by pidfd": "system(434, os.getppid(), 0)",
    "being root": "os.setuid(0)",
    "more memory": "call(libc.setrlimit, resource.RLIMIT_AS, b'\\xff' * 16)",
    "limits of the parent": "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "new namespaces": "call(libc.unshare, 0x10000000)",
    "another root": "os.chroot('/')",
    "mounting": "call(libc.mount, b'none', b'/', b'tmpfs', 0, 0)",
    "memory that is a file": "os.memfd_create('x')",
    "io_uring": "system(425, 1, bytes(120))",
    "kernel programs": "system(321, 0, bytes(64), 64)",
    "keys": "system(250, 0, -3, 0)",
    "the older call table": "system(0x40000000 | 2, b'/etc/passwd', 0)",
    "lifting the filter": "call(libc.prctl, 22, 0, 0, 0, 0)",
    "being traced": "call(libc.prctl, 4, 1, 0, 0, 0)",
    "signals of a timer": "signal.setitimer(signal.ITIMER_REAL, 1)",
}
X86_ONLY = ("system(",)


@pytest.mark.parametrize("what", HARM)
def test_harm_is_refused_by_the_kernel(sandbox: Sandbox, tmp_path: Path, what: str):
    if platform.machine() != "x86_64" and HARM[what].startswith(X86_ONLY):
        pytest.skip("numbers of x86-64")
    kept, target = tmp_path / "kept", tmp_path / "target"
    kept.write_text("kept")
    tmp_path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"""
            import ctypes, os, resource, signal, sys
            import socket
            KEPT, TARGET, PORT = {str(kept)!r}, {str(target)!r}, {server.getsockname()[1]}
            libc = ctypes.CDLL(None, use_errno=True)
            def call(function, *arguments):
                if function(*arguments) == -1:
                    raise OSError(ctypes.get_errno(), "refused")
            def system(*arguments):
                call(libc.syscall, *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
            try:
                {HARM[what]}
            except OSError as error:
                print(error.errno)
            else:
                print("done")
        """
        expected = {"writing into its input": "27", "a process by clone3": "38"}.get(what, "1")  # EFBIG, ENOSYS, EPERM
        assert output(sandbox, program) == f"{expected}\n"
    assert kept.read_text() == "kept" and kept.stat().st_mode & 0o777 and not target.exists()
    assert sandbox._process.poll() is None


@pytest.mark.parametrize(
    ("program", "late"),
    [
        ("import time; time.sleep(600)", True),
        ("while True: pass", True),
        ("import os, time; os.close(1); time.sleep(600)", True),
        (
            "import signal\nfor s in range(1, 32):\n  try: signal.signal(s, 1)\n  except OSError: pass\nwhile 1: pass",
            True,
        ),
        ("import threading, time\nwhile True:\n  threading.Thread(target=time.sleep, args=(600,)).start()", None),
        ("import threading\ndef f():\n  while True: pass\nfor _ in range(8): threading.Thread(target=f).start()", True),
        ("x = bytearray(2**30)", False),
        ("x = []\nwhile True: x.append(x * 2 or [1] * 10**6)", None),
        ("while True: print('x' * 10**6)", False),
        ("import os\nos._exit(1)", False),
        ("import os\nos.abort()", False),
        ("import ctypes\nctypes.string_at(0)", False),
        ("import sys\nsys.setrecursionlimit(2**31 - 1)\ndef f(): f()\nf()", None),
        ("9**9**9**9", None),
    ],
)
def test_what_takes_too_much_ends(sandbox: Sandbox, program: str, late: bool | None):
    ran = sandbox.run(program, **LIMITS | ({} if late is False else {"time_limit_s": 0.3}))
    assert ran.output is None
    assert late is None or ran.late == late
    assert sandbox.run("print(1)", **LIMITS) == Ran(b"1\n")
    assert not psutil.Process(sandbox._process.pid).children()


def test_a_program_has_neither_environment_nor_files(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET", "s")
    assert output(sandbox, "import os; print(dict(os.environ).get('SECRET'))") == "None\n"
    still_open = """
        import os
        def is_open(file):
            try: os.fstat(file)
            except OSError: return False
            return True
        print([file for file in range(256) if is_open(file)])
    """
    assert output(sandbox, still_open) == "[0, 1, 2]\n"
    assert output(sandbox, "import os\ntry: os.getcwd()\nexcept OSError: print('nowhere')") == "nowhere\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give programs a user of their own")
def test_as_root_programs_are_another_user_with_an_empty_root_folder(sandbox: Sandbox):
    assert output(sandbox, "import os; print(*os.getresuid(), *os.getresgid())".replace("res", "e")) != "0 0\n"
    uid = FIRST_UID + os.getpid()
    assert output(sandbox, "import os; print(os.getuid(), os.geteuid(), os.getgid())") == f"{uid} {uid} {uid}\n"
    assert os.readlink(f"/proc/{sandbox._process.pid}/root") not in ("/", "")
    assert os.readlink(f"/proc/{sandbox._process.pid}/ns/net") != os.readlink("/proc/self/ns/net")


# Becomes a user without rights, but for reading files: the interpreter may lie in a folder of root's own.
WITHOUT_ROOT = """
    import ctypes, os, struct
    from dapo_megatron.rewards.sandbox import Sandbox
    libc, read_search = ctypes.CDLL(None), 1 << 2
    os.setgroups([])
    libc.prctl(8, 1, 0, 0, 0)
    os.setresuid(65534, 65534, 65534)
    libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[read_search] * 3, 0, 0, 0))
    libc.prctl(47, 2, 2, 0, 0)
    sandbox = Sandbox()
    status = open(f"/proc/{sandbox._process.pid}/status").read()
    sandbox.check()
    print(sandbox.run("print(1)", time_limit_s=20, memory_limit_mib=256, most_output=9).output)
    sandbox.close()
    print(status.split("Uid:")[1].split()[0])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run without root already")
def test_without_root_the_kernel_refuses_as_much():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_ROOT)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "b'1\\n'\n65534\n", done.stderr


def test_programs_end_with_a_killed_parent():
    code = """
        import os
        from dapo_megatron.rewards.sandbox import Sandbox
        s = Sandbox()
        print(s._process.pid, flush=True)
        s.run("while True: pass", time_limit_s=600, memory_limit_mib=256, most_output=10)
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        server = psutil.Process(int(parent.stdout.readline()))
        deadline = time.monotonic() + 30
        while not server.children() and time.monotonic() < deadline:
            time.sleep(0.02)
        (program,) = server.children()
    finally:
        parent.kill()
        parent.wait(30)
        parent.stdout.close()
    _, alive = psutil.wait_procs([server, program], timeout=30)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
