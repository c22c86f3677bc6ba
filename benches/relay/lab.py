"""A relay in a control group of its own, the programs that load it, and everything ended that was begun."""

import json
import os
import resource
import select
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from figures import Failed, run

# The server's share of one core, and how often it is handed out. The kernel gives no less than 1 ms at a time, so this is
# the shortest period there is for that share: with the usual 100 ms the server would stand still for 65 of them, and
# every latency would be that of the scheduler.
SHARE = 0.35
QUOTA_US = 1000
PERIOD_US = round(QUOTA_US / SHARE)

LOOPBACK = "127.0.0.1"
GROUPS = Path("/sys/fs/cgroup")


class Group:
    """A control group whose CPU time can be limited and is counted, of either version."""

    def __init__(self):
        name = f"mesh-relay-bench-{os.getpid()}"
        if (GROUPS / "cgroup.controllers").exists():
            self.folders, self.cpu = [GROUPS / name], GROUPS / name / "cpu.stat"
        else:
            self.folders, self.cpu = [GROUPS / "cpu" / name, GROUPS / "cpuacct" / name], GROUPS / "cpuacct" / name / "cpuacct.usage"
        try:
            for folder in self.folders:
                folder.mkdir(exist_ok=True)
            self.limit(False)
        except OSError as reason:
            self.remove()
            raise Failed(f"no control group with a CPU quota can be made: {reason}") from reason

    def join(self):
        """Moves the calling process in; for between fork and exec."""
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

    def limit(self, on):
        folder = self.folders[0]
        if (folder / "cpu.max").exists():
            (folder / "cpu.max").write_text(f"{QUOTA_US if on else 'max'} {PERIOD_US}")
        else:
            (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (folder / "cpu.cfs_quota_us").write_text(str(QUOTA_US if on else -1))

    def remove(self):
        for folder in self.folders:
            for _ in range(50):
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    pass
                except OSError:
                    time.sleep(0.02)
                    continue
                break


class Relay:
    """A contender, running, for a `with` block."""

    def __init__(self, name):
        self.name, self.process, self.group, self.children = name, None, None, []

    def __enter__(self):
        self.work = tempfile.TemporaryDirectory(prefix="mesh-relay-bench-")
        self.log = open(f"{self.work.name}/log", "w", encoding="utf-8")
        try:
            self.port = free_port()
            self.loader, command = self.prepare()
            self.group = Group()
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, preexec_fn=self.into_group)
            self.await_listening()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for child in [*self.children, *([self.process] if self.process else [])]:
            child.terminate()
            try:
                child.wait(timeout=5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        if self.group:
            self.group.remove()
        self.log.close()
        self.work.cleanup()

    def into_group(self):
        self.group.join()
        most_files()

    def await_listening(self):
        for _ in range(250):
            if self.process.poll() is not None:
                break
            try:
                socket.create_connection((LOOPBACK, self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.02)
        raise Failed(f"{self.name} did not start: {Path(self.log.name).read_text(encoding='utf-8').strip()}")

    def limit(self, on):
        """Whether the quota holds. Clients connect without."""
        self.group.limit(on)

    def start(self, *command, urgent=False):
        """A command of the load generator; `urgent` if it measures time and must not wait for others like it."""
        environment = os.environ | {"RUST_BACKTRACE": "0"} | ({"SERVER_CPU": str(self.group.cpu)} if self.group else {})
        child = Load([*self.loader, *map(str, command)], environment, self.log, urgent)
        self.children.append(child)
        return child

    def memory(self, peak=False):
        """Bytes of the server that no other process shares, or the most that were resident since `forget_peak`."""
        if peak:
            return kilobytes(f"/proc/{self.process.pid}/status", "VmHWM:") * 1024
        return kilobytes(f"/proc/{self.process.pid}/smaps_rollup", "Pss:") * 1024

    def forget_peak(self):
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def alive(self):
        if self.process and self.process.poll() is not None:
            raise Failed(f"{self.name} has ended: {Path(self.log.name).read_text(encoding='utf-8')[-2000:]}")


class MeshRelay(Relay):
    """The release build's `mesh relay`: its own certificate, pinned."""

    def prepare(self):
        node = certificate(self.work.name, self.port)
        address = f"{LOOPBACK}:{self.port}"
        command = [os.environ["MESH"], "relay", "--state-dir", f"{self.work.name}/state", "--listen", address]
        return [os.environ["RELAY_LOAD"], address, node["CertName"]], command


class IrohRelay(Relay):
    """iroh-relay as its crate builds it, with TLS by a certificate of the same kind, and no limits."""

    def prepare(self):
        certificate(self.work.name, self.port)
        pem = f"{self.work.name}/state/tls.pem"
        address = f"{LOOPBACK}:{self.port}"
        Path(f"{self.work.name}/config").write_text(f"""
            enable_metrics = false
            http_bind_addr = "{LOOPBACK}:{free_port()}"
            [tls]
            https_bind_addr = "{address}"
            cert_mode = "Manual"
            manual_cert_path = "{pem}"
            manual_key_path = "{pem}"
        """, encoding="utf-8")
        return [os.environ["PEERS"], "iroh", address, pem], [os.environ["IROH_RELAY"], "--config-path", f"{self.work.name}/config"]


class OtherRelay(Relay):
    """A DERP server that somebody else runs: no quota, and nothing known of its CPU time and memory."""

    def __init__(self, address):
        super().__init__(address)

    def __enter__(self):
        self.work = tempfile.TemporaryDirectory(prefix="mesh-relay-bench-")
        self.log = open(f"{self.work.name}/log", "w", encoding="utf-8")
        self.loader = [os.environ["RELAY_LOAD"], self.name, "any"]
        return self

    def limit(self, on):
        pass


class Load:
    """A program that answers each line with a line of figures."""

    def __init__(self, command, environment, log, urgent):
        def before():
            most_files()
            if urgent:
                os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))

        self.command = command
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=log, text=True, bufsize=1, preexec_fn=before)
        self.log = log.name
        self.answer(120)

    def ask(self, line, patience=180):
        self.tell(line)
        return self.answer(patience)

    def tell(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def answer(self, patience):
        ready, _, _ = select.select([self.process.stdout], [], [], patience)
        line = self.process.stdout.readline().strip() if ready else ""
        if not line:
            self.kill()
            raise Failed(f"{' '.join(self.command)} says nothing: {Path(self.log).read_text(encoding='utf-8')[-2000:]}")
        return {name: float(value) for name, _, value in (word.partition("=") for word in line.split()) if value}

    def has_answered(self):
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def end(self):
        self.process.stdin.close()
        self.wait(30)

    def terminate(self):
        self.process.terminate()

    def kill(self):
        self.process.kill()

    def wait(self, timeout=None):
        self.process.wait(timeout)


def certificate(work, port):
    """Has mesh make a certificate in `work`/state; returns the node of a DERP map that pins it."""
    return json.loads(run(os.environ["MESH"], "relay", "--state-dir", f"{work}/state", "--listen",
                          f"{LOOPBACK}:{port}", "--print-node"))


def free_port():
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        return taken.getsockname()[1]


def most_files():
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def kilobytes(path, name):
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise Failed(f"{path} has no {name}")


def kernel_memory():
    """Bytes that the kernel uses for itself and for sockets."""
    pages = 0
    for line in Path("/proc/net/sockstat").read_text(encoding="utf-8").splitlines():
        if line.startswith("TCP:"):
            words = line.split()
            pages = int(words[words.index("mem") + 1])
    return kilobytes("/proc/meminfo", "Slab:") * 1024 + pages * os.sysconf("SC_PAGE_SIZE")
