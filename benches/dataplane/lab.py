"""Two network namespaces with a cable and a tunnel between them, and everything ended that was begun.

    a: 10.9.0.1 == tunnel ================================ tunnel == b: 10.9.0.2
       192.168.77.1 e0 -------- veth, maybe shaped -------- e0 192.168.77.2
"""

import os
import subprocess
import tempfile
import time
from pathlib import Path

from figures import TICKS, Failed, process_ticks, run

ENDS = ("a", "b")
NUMBER = {"a": 1, "b": 2}
UNDERLAY, OVERLAY = "192.168.77.", "10.9.0."
# Interfaces in two namespaces share /var/run/wireguard, so names carry the process id.
ID = f"mp{os.getpid() % 10_000_000}"

# How each peer is started in the foreground, and what it is told so that it logs little and keeps its privileges.
PEERS = {
    "wireguard-go": ["wireguard-go", "-f"],
    "boringtun": ["boringtun-cli", "-f"],
    "gotatun": ["gotatun", "-f"],
}
QUIET = {"LOG_LEVEL": "error", "RUST_LOG": "error", "WG_LOG_LEVEL": "error", "WG_SUDO": "true"}


class Lab:
    """The two namespaces, for a `with` block."""

    def __init__(self, program, mtu=1420, offloads=True, rate=None):
        """`program` is a command that takes an interface name, or none for no tunnel; `rate` in Mbit/s shapes the veth."""
        self.program, self.mtu, self.offloads, self.rate = program, mtu, offloads, rate
        self.address = {end: (OVERLAY if program else UNDERLAY) + str(NUMBER[end]) for end in ENDS}
        self.tunnels, self.children = {}, []

    def __enter__(self):
        self.work = tempfile.TemporaryDirectory(prefix=ID)
        try:
            self.build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for end in ENDS:
            pids = subprocess.run(["ip", "netns", "pids", ID + end], capture_output=True, text=True).stdout
            for pid in pids.split():
                try:
                    os.kill(int(pid), 15)
                except ProcessLookupError:
                    pass
        for child in self.children:
            try:
                child.wait(timeout=2)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for end in ENDS:
            subprocess.run(["ip", "netns", "del", ID + end], capture_output=True)
            Path(f"/var/run/wireguard/{ID}{end}.sock").unlink(missing_ok=True)
        self.work.cleanup()

    def build(self):
        for end in ENDS:
            run("ip", "netns", "add", ID + end)
        run("ip", "link", "add", "e0", "netns", ID + "a", "type", "veth", "peer", "name", "e0", "netns", ID + "b")
        for end in ENDS:
            self.wait_in(end, "sysctl", "-qw", "net.ipv4.tcp_no_metrics_save=1")
            self.ip(end, "link", "set", "lo", "up")
            self.ip(end, "addr", "add", f"{UNDERLAY}{NUMBER[end]}/24", "dev", "e0")
            self.ip(end, "link", "set", "e0", "up")
            if not self.offloads:
                features = ["rx", "tx", "sg", "tso", "gso", "gro"]
                self.wait_in(end, "ethtool", "-K", "e0", *(word for name in features for word in (name, "off")))
            if self.rate:
                # 20 ms of buffer and a burst of 1 ms, as a router of that speed has them.
                self.wait_in(end, "tc", "qdisc", "add", "dev", "e0", "root", "tbf", "rate", f"{self.rate}mbit",
                             "burst", str(max(self.rate * 125, 16_000)), "latency", "20ms")
        if self.program:
            self.connect()

    def connect(self):
        keys = {end: run("wg", "genkey") for end in ENDS}
        for end in ENDS:
            log = open(f"{self.work.name}/{end}.log", "w", encoding="utf-8")
            environment = os.environ | QUIET | {"WG_LOG_FILE": f"{self.work.name}/{end}.file"}
            self.tunnels[end] = self.start(end, *self.program, ID + end, env=environment, stdout=log, stderr=log)
        for end, other in (ENDS, ENDS[::-1]):
            self.await_ready(end)
            public = run("wg", "pubkey", input=keys[other]).strip()
            self.wait_in(end, "wg", "set", ID + end, "private-key", "/dev/stdin", "listen-port", f"5182{NUMBER[end]}",
                         "peer", public, "allowed-ips", f"{OVERLAY}{NUMBER[other]}/32",
                         "endpoint", f"{UNDERLAY}{NUMBER[other]}:5182{NUMBER[other]}", input=keys[end])
            self.ip(end, "addr", "add", f"{OVERLAY}{NUMBER[end]}/24", "dev", ID + end)
            self.ip(end, "link", "set", ID + end, "mtu", str(self.mtu), "up")
        self.await_answer()

    def await_answer(self):
        for _ in range(50):
            if self.start("a", "ping", "-q", "-c", "1", "-W", "0.2", self.address["b"]).wait() == 0:
                return
        raise Failed(f"no answer through {self.program[0]}: {self.logs()}")

    def await_ready(self, end):
        for _ in range(200):
            if self.tunnels[end].poll() is not None:
                break
            if self.is_ready(end):
                return
            time.sleep(0.02)
        raise Failed(f"{self.program[0]} did not start: {self.logs()}")

    def is_ready(self, end):
        return os.path.exists(f"/var/run/wireguard/{ID}{end}.sock")

    def logs(self):
        return " ".join(Path(f"{self.work.name}/{end}.log").read_text(encoding="utf-8").strip() for end in ENDS)

    def ip(self, end, *arguments):
        run("ip", "-n", ID + end, *arguments)

    def wait_in(self, end, *command, **options):
        return run("ip", "netns", "exec", ID + end, *command, **options)

    def start(self, end, *command, **options):
        """Starts a command in a namespace; it ends with the lab."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True} | options
        child = subprocess.Popen(["ip", "netns", "exec", ID + end, *command], **options)
        self.children.append(child)
        return child

    def cpu_seconds(self):
        """What both ends of the tunnel have used so far."""
        return sum(process_ticks(child.pid)[0] for child in self.tunnels.values()) / TICKS

    def peak_memory(self):
        """The larger of the two ends, in MiB."""
        peaks = []
        for child in self.tunnels.values():
            status = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8")
            peaks += [int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:")]
        return max(peaks)


class Carrier(Lab):
    """With the tunnel of `benches/src/bin/carrier.rs`, which needs no keys."""

    def __init__(self, program):
        super().__init__([program])

    def connect(self):
        for end, other in (ENDS, ENDS[::-1]):
            log = open(f"{self.work.name}/{end}.log", "w", encoding="utf-8")
            addresses = [f"{UNDERLAY}{NUMBER[which]}:5182{NUMBER[which]}" for which in (end, other)]
            self.tunnels[end] = self.start(end, *self.program, ID + end, *addresses, stdout=log, stderr=log)
            self.await_ready(end)
            self.ip(end, "addr", "add", f"{OVERLAY}{NUMBER[end]}/24", "dev", ID + end)
            self.ip(end, "link", "set", ID + end, "mtu", str(self.mtu), "up")
        self.await_answer()

    def is_ready(self, end):
        return subprocess.run(["ip", "-n", ID + end, "link", "show", ID + end], capture_output=True).returncode == 0


def kernel_seconds():
    """CPU of the kernel's threads that take over when there is much to do for the network."""
    threads = [path.parent for path in Path("/proc").glob("[0-9]*/comm") if "ksoftirqd" in read_or_nothing(path)]
    return sum(process_ticks(path.name)[0] for path in threads) / TICKS


def read_or_nothing(path):
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return ""
