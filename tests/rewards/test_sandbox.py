"""The sandbox under attack, in every form that this machine can give it."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards.folder import Folder
from rewards.isolation import strongest, user_of
from rewards.jail import seccomp
from rewards.sandbox import Isolation, Limits, Result, Sandbox, SandboxError

LIMITS = Limits(wall_s=60, cpu_s=60, memory_bytes=96 << 20, processes=24, output_bytes=50_000, disk_bytes=4 << 20)


def _had(isolation: Isolation) -> Isolation:
    try:
        user_of(isolation)
    except SandboxError as error:
        pytest.skip(str(error))
    return isolation


@pytest.fixture(params=list(Isolation))
def isolation(request) -> Isolation:
    return _had(request.param)


@pytest.fixture
def sandbox(isolation) -> Sandbox:
    """One of every form."""
    return Sandbox(wanted=isolation, limits=LIMITS)


@pytest.fixture(params=[Isolation.NAMESPACES, Isolation.LANDLOCK])
def counted(request) -> Sandbox:
    """The two in which the supervisor finds processes in different ways."""
    return Sandbox(wanted=_had(request.param), limits=LIMITS)


def python(sandbox: Sandbox, source: str, **settings) -> Result:
    """Runs a script; `limits` are changes of the sandbox's own."""
    files = {"main.py": source, **settings.pop("files", {})}
    return asyncio.run(sandbox.run(["python3", "-S", "main.py"], files=files, **settings))


def test_some_isolation_works_here():
    assert Sandbox().isolation == strongest()


def test_an_isolation_that_cannot_be_had_is_one_sentence(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    user_of.cache_clear()
    try:
        with pytest.raises(SandboxError, match="bubblewrap is not installed"):
            _ = Sandbox(wanted=Isolation.BUBBLEWRAP).isolation
    finally:
        user_of.cache_clear()


@pytest.mark.parametrize("wanted", [Isolation.BUBBLEWRAP, Isolation.NAMESPACES])
def test_a_virtual_environment_that_is_a_link_keeps_its_packages(wanted, tmp_path):
    """The interpreter is started through the link, and what runs in the sandbox imports what only the target holds."""
    _had(wanted)
    link = tmp_path / "env"
    link.symlink_to(Path(sys.prefix).resolve())
    source = (
        "import asyncio, sys\n"
        "from rewards.sandbox import Isolation, Sandbox\n"
        "sandbox = Sandbox(wanted=Isolation(sys.argv[1]))\n"
        "done = asyncio.run(sandbox.run(['python3', '-c', 'import sys, numpy; print(sys.prefix)']))\n"
        "sys.stdout.buffer.write(done.stdout + done.stderr)"
    )
    command = [str(link / "bin/python"), "-c", source, str(wanted)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == str(link), done.stdout + done.stderr


def test_input_files_output_and_status(sandbox):
    source = "import sys\nprint(open('data/x.txt').read() + sys.stdin.read())\nsys.stderr.write('err')\nsys.exit(3)"
    result = python(sandbox, source, stdin=b" and stdin", files={"data/x.txt": "a file"})
    assert (result.stdout, result.stderr, result.returncode) == (b"a file and stdin\n", b"err", 3)
    assert result.exceeded is None and not result.ok


def test_a_program_that_ignores_its_input(counted):
    assert python(counted, "print(1)", stdin=b"x" * (1 << 20)).stdout == b"1\n"


def test_a_missing_program_ends_as_in_a_shell(sandbox):
    result = asyncio.run(sandbox.run(["no-such-program"]))
    assert result.returncode == 127 and result.stderr.startswith(b"no-such-program: ")


def test_death_by_signal(counted):
    assert python(counted, "import os; os.kill(os.getpid(), 11)").returncode == -11


def test_fork_bomb(counted):
    marker = f"keel-bomb-{os.getpid()}-{time.time_ns()}"
    source = f"import os  # {marker}\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    limits = Limits(wall_s=1.5, processes=16, memory_bytes=1 << 30)
    result = asyncio.run(counted.run(["python3", "-c", source], limits=limits))
    assert result.exceeded in ("processes", "wall", "cpu")
    assert _processes_with(marker) == []


def test_number_of_processes(counted):
    source = """
import os, time
children = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        children += 1
    except OSError:
        break
os.write(1, str(children).encode())
"""
    result = python(counted, source, limits=Limits(processes=16))
    assert result.exceeded == "processes" or int(result.stdout) <= 20


def test_memory_bomb(counted):
    result = python(counted, "held = []\nwhile True: held.append(bytearray(1 << 20))")
    assert not result.ok and (result.exceeded == "memory" or b"MemoryError" in result.stderr)


def test_memory_bomb_of_many_processes(counted):
    source = "import os, time\nfor _ in range(3): os.fork()\nheld = b'x' * (40 << 20)\ntime.sleep(60)"
    assert python(counted, source).exceeded == "memory"


def test_memory_bomb_in_shared_pages(counted):
    source = """
import mmap
held = []
while True:
    held.append(mmap.mmap(-1, 8 << 20))
    held[-1].write(b'x' * (8 << 20))
"""
    assert python(counted, source).exceeded == "memory"


def test_memory_that_belongs_to_no_process(sandbox):
    source = "import os\ntry: os.memfd_create('x'); print('made')\nexcept OSError as error: print('refused')"
    if seccomp.is_supported():
        assert python(sandbox, source).stdout == b"refused\n"


def test_pages_that_children_share_count_once(counted):
    source = """
import os, time
held = b'x' * (40 << 20)
children = [os.fork() for _ in range(3)]
time.sleep(0.5)
"""
    assert python(counted, source).ok


def test_infinite_output(counted):
    result = python(counted, "import sys\nwhile True: sys.stdout.write('x' * 4096)")
    assert result.exceeded == "output" and result.stdout == b"x" * LIMITS.output_bytes


def test_wall_time(counted):
    result = python(counted, "import time\nprint('up', flush=True)\ntime.sleep(600)", limits=Limits(wall_s=1.5))
    assert result.exceeded == "wall" and result.returncode == -9 and result.wall_s < 60


def test_cpu_time_of_one_process_and_of_many(counted):
    assert python(counted, "while True: pass", limits=Limits(wall_s=60, cpu_s=0.3)).exceeded == "cpu"
    many = "import os\nfor _ in range(2): os.fork()\nwhile True: pass"
    assert python(counted, many, limits=Limits(wall_s=60, cpu_s=0.3)).exceeded == "cpu"


@pytest.mark.parametrize("in_folder", [False, True])
def test_full_disk(counted, in_folder):
    source = """
for number in range(64):
    with open(f'file{number}', 'wb') as file:
        file.write(b'x' * (1 << 20))
import time; time.sleep(60)
"""
    with counted.folder() as folder:
        result = python(counted, source, folder=folder if in_folder else None)
        written = sum(path.stat().st_size for path in folder.work.iterdir())
    assert not result.ok and (result.exceeded == "disk" or b"OSError" in result.stderr)
    assert written < 1 << 30


def test_too_many_files(counted):
    source = "import time\nfor number in range(400): open(f'file{number}', 'w').close()\ntime.sleep(60)"
    with counted.folder() as folder:
        assert python(counted, source, folder=folder, limits=Limits(wall_s=60, files=200)).exceeded == "disk"


def test_grandchildren_die_with_the_program(sandbox, tmp_path):
    marker = f"keel-orphan-{os.getpid()}-{time.time_ns()}"
    source = f"""
import os, subprocess, sys
if os.fork() == 0:
    try: os.setsid()
    except OSError: pass
    if os.fork() == 0:
        subprocess.Popen(['sleep', '600'], stdin=subprocess.DEVNULL)
        os.execlp('python3', '{marker}', '-c', 'import time; time.sleep(600)')
    os._exit(0)
import time; time.sleep(0.3)
print('done')
"""
    result = python(sandbox, source)
    assert result.ok and result.stdout == b"done\n" and result.wall_s < 60
    assert _processes_with(marker) == []


def test_cancelling_ends_the_program(sandbox):
    marker = f"keel-cancelled-{os.getpid()}-{time.time_ns()}"

    async def cancel() -> None:
        running = asyncio.create_task(sandbox.run(["python3", "-c", f"import time; time.sleep(600)  # {marker}"]))
        while not _processes_with(f"{marker}") and not running.done():
            await asyncio.sleep(0.02)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(cancel())
    assert _processes_with(marker) == []


def test_a_killed_caller_leaves_nothing(isolation):
    marker = f"keel-caller-{os.getpid()}-{time.time_ns()}"
    caller = f"""
import asyncio
from rewards.sandbox import Isolation, Sandbox
sandbox = Sandbox(wanted=Isolation({str(isolation)!r}))
asyncio.run(sandbox.run(["python3", "-c", "import time; time.sleep(600)  # {marker}"]))
"""
    process = subprocess.Popen([sys.executable, "-c", caller], cwd=Path(__file__).parents[2])
    try:
        assert _eventually(lambda: any("time.sleep" in line.split("\0")[2] for line in _processes_with(marker)))
    finally:
        process.kill()
        process.wait()
    assert _eventually(lambda: not _processes_with(marker))


def test_writing_outside_the_folder(sandbox):
    places = ["/etc/keel", "/usr/keel", "/root/keel", "../keel", "/proc/self/../../etc/keel", "/proc/self/root/keel"]
    source = f"""
for place in {places!r}:
    try: open(place, 'w'); print('wrote', place)
    except OSError: print('refused')
"""
    assert python(sandbox, source).stdout == b"refused\n" * len(places)
    assert not any(os.path.exists(place) for place in places)


def test_writing_beside_the_folder(sandbox, isolation, tmp_path):
    """tmp_path belongs to the user that the tests run as, which only namespaces and Landlock tell from the program."""
    if isolation is Isolation.RLIMITS and os.geteuid() != 0:
        pytest.skip("permissions alone protect files of other users only")
    result = python(sandbox, f"open({str(tmp_path / 'x')!r}, 'w')")
    assert result.returncode == 1 and list(tmp_path.iterdir()) == []


def test_links_lead_nowhere(sandbox, tmp_path):
    """Neither the program through a link of its own nor the caller through a link of the program's."""
    tmp_path.chmod(0o700)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "secret").chmod(0o600)
    source = f"""
import os
os.symlink({str(tmp_path)!r}, 'out')
os.symlink({str(tmp_path / "secret")!r}, 'link')
os.mkfifo('pipe')
for name in ('out/secret', 'link'):
    try: print(open(name).read())
    except OSError: print('refused')
"""
    with sandbox.folder() as folder:
        assert python(sandbox, source, folder=folder).stdout == b"refused\nrefused\n"
        for name in ("link", "out/secret", "pipe"):
            with pytest.raises(OSError):
                folder.read(name)
        with pytest.raises(OSError):
            folder.write("out/secret", "changed")
        folder.write("link", "changed")
        assert folder.read("link") == b"changed"
    assert (tmp_path / "secret").read_text() == "secret"


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", ".", ""])
def test_names_that_lead_out_of_the_folder(counted, name):
    with pytest.raises((ValueError, OSError)):
        asyncio.run(counted.run(["true"], files={name: "x"}))
    with Folder() as folder, pytest.raises((ValueError, OSError)):
        folder.read(name)


def test_a_folder_lasts_and_goes(sandbox):
    with sandbox.folder() as folder:
        python(
            sandbox,
            "import os; open('kept', 'w').write('1'); os.makedirs('/'.join('d' * 600)); os.chmod('d', 0)",
            folder=folder,
        )
        assert folder.read("kept") == b"1"
        source = "print(open('kept').read()); open('kept', 'a').write('2')"
        assert python(sandbox, source, folder=folder).stdout == b"1\n"
        assert folder.read("kept", max_bytes=1) == b"1"
        top = folder.work.parent
    assert not top.exists()


def test_what_may_be_read_through_a_link_may_be_read_again(isolation):
    """Below /tmp, where a folder's own files are: a virtual environment may be such a link."""
    with tempfile.TemporaryDirectory(dir="/tmp") as top:
        os.chmod(top, 0o755)
        (Path(top) / "there").mkdir(mode=0o755)
        (Path(top) / "there" / "words").write_text("hello")
        (Path(top) / "link").symlink_to("there")
        sandbox = Sandbox(wanted=isolation, limits=LIMITS, readable=(f"{top}/link",))
        source = f"print(open('{top}/link/words').read())"
        assert python(sandbox, source).stdout == b"hello\n"
        with sandbox.folder() as folder:
            for _ in range(2):
                assert python(sandbox, source, folder=folder).stdout == b"hello\n"


def test_the_environment_stays_outside(sandbox, monkeypatch):
    monkeypatch.setenv("KEEL_TEST_SECRET", "s3cret")
    source = """
import os, pathlib
print('KEEL_TEST_SECRET' in os.environ)
for path in pathlib.Path('/proc').glob('[0-9]*/environ'):
    try: print(b's3cret' in path.read_bytes())
    except OSError: pass
"""
    result = python(sandbox, source, env={"GIVEN": "x"})
    assert result.returncode in (0, 1) and b"True" not in result.stdout
    assert result.stdout.startswith(b"False")
    assert python(sandbox, "import os; print(os.environ['GIVEN'])", env={"GIVEN": "x"}).stdout == b"x\n"


def test_other_processes_are_out_of_reach(sandbox):
    with subprocess.Popen(["sleep", "600"]) as victim:
        source = f"""
import os
for pid in ({victim.pid}, os.getppid(), -1):
    try: os.kill(pid, 9); print('killed', pid)
    except OSError: print('refused')
"""
        alive = None
        try:
            result = python(sandbox, source)
            alive = victim.poll() is None
        finally:
            victim.kill()
    assert alive and result.stdout == b"refused\n" * 3


@pytest.fixture
def listener() -> Iterator[tuple[int, list[object]]]:
    """A TCP server on the loopback interface, and what connected to it."""
    connected: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connected.append(server.accept())
                except OSError:
                    return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1], connected
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_no_network_nor_loopback(sandbox, listener, tmp_path):
    port, connected = listener
    source = f"""
import socket
for address in (('127.0.0.1', {port}), ('1.1.1.1', 53)):
    try: socket.create_connection(address, 2); print('connected')
    except OSError: print('refused')
try: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53)); print('sent')
except OSError: print('refused')
"""
    assert python(sandbox, source).stdout == b"refused\n" * 3
    assert connected == []


def test_sockets_of_the_host(sandbox):
    name = f"\0keel-{os.getpid()}-{time.time_ns()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        source = f"""
import socket
try: socket.socket(socket.AF_UNIX).connect({name!r}); print('connected')
except OSError: print('refused')
"""
        assert python(sandbox, source).stdout == b"refused\n"


def test_privileges_cannot_be_gained(sandbox):
    source = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.unshare(0x10000000), libc.unshare(0x20000), libc.mount(b'none', b'/mnt', b'tmpfs', 0, None))
print(libc.ptrace(16, os.getppid(), 0, 0), libc.chroot(b'/'))
"""
    assert python(sandbox, source).stdout == b"-1 -1 -1\n-1 -1\n"


def test_a_program_to_talk_with(sandbox):
    async def talk() -> tuple[bytes, bytes, Result, Result]:
        async with await sandbox.open(["python3", "-u", "-i", "-q"]) as process:
            process.stdin.write(b"x = 20\nprint(x + 1)\n")
            first = await process.stdout.readline()
            process.stdin.write(b"x += 1; print(x * 2)\n")
            second = await process.stdout.readline()
            process.kill()
            killed = await process.wait()
        return first, second, killed, await process.wait()

    first, second, killed, again = asyncio.run(talk())
    assert (first, second) == (b"21\n", b"42\n")
    assert killed.returncode == -9 and killed.exceeded is None and killed == again


def test_output_that_nobody_reads_does_not_keep_a_process(counted):
    async def leave() -> Result:
        async with await counted.open(["python3", "-c", "while True: print('x' * 1000)"]) as process:
            await process.stdout.readline()
        return await process.wait()

    assert asyncio.run(asyncio.wait_for(leave(), 60)).returncode == -9


def test_many_at_once(counted):
    async def all_of_them() -> list[Result]:
        return await asyncio.gather(*(counted.run(["sh", "-c", f"echo {number}"]) for number in range(12)))

    before = len(os.listdir("/proc/self/fd"))
    assert [result.stdout for result in asyncio.run(all_of_them())] == [b"%d\n" % number for number in range(12)]
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_limits_are_checked():
    with pytest.raises(ValueError, match="cpu_s must be above 0"):
        Limits(cpu_s=0)


def _processes_with(marker: str) -> list[str]:
    """Command lines of this machine's processes that hold the marker."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if marker in line and path.parent.name != str(os.getpid()) and "rewards.sandbox" not in line:
            found.append(line)
    return found


def _eventually(holds) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.05)
    return False
