"""What is measured in a lab. Each function returns figures by name."""

import json
import math
import os
import statistics
import subprocess
import time

from figures import Failed
from lab import kernel_seconds

PORT = 5201


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def tcp(lab, name, streams, seconds, reverse=False, ping=False, settle=0):
    """iperf3 from a to b, or back; with a ping beside it if asked for, which is latency in the setting of this rate.

    The first `settle` seconds do not count. "CPU s/GB" is what the tunnel's two ends use, "of all" with iperf3 and the kernel.
    """
    server = lab.start("b", "iperf3", "-s", "-1", "-p", str(PORT))
    wait_for_listener(lab)
    tunnel, rest = lab.cpu_seconds(), children_seconds() + kernel_seconds()
    options = ["-t", str(seconds), "-O", str(settle), "-P", str(streams), *(["-R"] if reverse else [])]
    client = lab.start("a", "iperf3", "-c", lab.address["b"], "-p", str(PORT), "-J", *options)
    figures = {}
    if ping:
        time.sleep(0.3)
        for key, value in pings(lab, int((seconds - 0.6) / 0.005), 0.005).items():
            figures[f"ping under load, {key}"] = value
    report = json.loads(client.communicate()[0])
    tunnel = lab.cpu_seconds() - tunnel
    server.wait()
    rest = children_seconds() + kernel_seconds() - rest
    if "error" in report:
        raise Failed(f"iperf3: {report['error']}")
    received = report["end"]["sum_received"]
    figures[f"{name}, Mbit/s"] = received["bits_per_second"] / 1e6
    if lab.tunnels and not settle:
        figures[f"{name}, CPU s/GB"] = tunnel / (received["bytes"] / 1e9)
        figures[f"{name}, CPU s/GB of all"] = (tunnel + rest) / (received["bytes"] / 1e9)
    return figures


def children_seconds():
    """CPU of our children that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def wait_for_listener(lab):
    for _ in range(100):
        if f":{PORT}" in lab.wait_in("b", "ss", "-tlnH"):
            return
        time.sleep(0.02)
    raise Failed("iperf3 does not listen")


def pings(lab, count, interval):
    """Median and 99th percentile in microseconds; one that is not answered took for ever."""
    ping = lab.start("a", "ping", "-n", "-i", str(interval), "-c", str(count), "-W", "1", lab.address["b"])
    lines = ping.communicate()[0].splitlines()
    times = [float(line.split("time=")[1].split()[0]) * 1000 for line in lines if "time=" in line]
    times += [math.inf] * (count - len(times))
    return {"p50 us": statistics.median(times), "p99 us": percentile(times, 0.99)}


def datagrams(lab, tool, size, seconds, start):
    """The highest rate of datagrams of `size` bytes at which at most one in a thousand is lost."""
    address = f"{lab.address['b']}:9000"
    receiver = lab.start("b", tool, "receive", address, stdin=subprocess.PIPE)

    def arrived():
        receiver.stdin.write("\n")
        receiver.stdin.flush()
        return int(receiver.stdout.readline())

    arrived()  # It listens now.
    best, low, high, rate = 0.0, 0.0, math.inf, start
    for _ in range(10):
        sender = lab.start("a", tool, "send", address, str(size), str(int(rate)), str(seconds))
        sent, elapsed = sender.communicate()[0].split()
        time.sleep(0.15)
        received, offered = arrived(), int(sent) / float(elapsed)
        if received >= int(sent) * 0.999:
            best, low = max(best, received / float(elapsed)), max(low, offered)
            if offered < rate * 0.95:
                break  # The sender can do no more.
        else:
            high = min(high, rate, max(offered, low))
        if high / max(low, 1) < 1.05:
            break
        rate = low * 1.6 if math.isinf(high) else math.sqrt(low * high) if low else high / 2
    receiver.stdin.close()
    receiver.wait()
    return {f"UDP {size} B without loss, packets/s": best}
