"""The link between two network namespaces, with faults that a test selects: delay, rate, loss, closed ports.

    python cable.py PID PID

PID: a process in each namespace, in which the link is then the interface `link0` of node 1 and 2. Settings are read as
lines of JSON, fields of `Link`, from standard input; the process, and with it the link, ends with that input.

It copies packets between two TUN devices, since netem is missing in many kernels, as are the packet filters that could
close a port.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from dataclasses import dataclass

INTERFACE = "link0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
MTU = 9000
QUEUE_S = 0.4
"""Seconds of traffic that a link with a rate queues; it drops packets beyond."""
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
TCP = 6


@dataclass(frozen=True)
class Link:
    """State of the link, the same in both directions."""

    delay_s: float = 0.0
    rate: float | None = None
    """Bytes per second; None: as fast as the copying."""
    loss: float = 0.0
    """Fraction of the packets that are dropped, at random; 1 is a cut link."""
    closed: tuple[int, int] | None = None
    """Lowest and highest port of the TCP servers whose connections are closed: of the two ports of a connection, the
    lower one is the server's, or both are ephemeral."""


def drops(link: Link, packet: bytes, chance: random.Random) -> bool:
    """Whether the link drops this IPv4 packet."""
    if link.loss and chance.random() < link.loss:
        return True
    if link.closed is None or packet[0] >> 4 != 4 or packet[9] != TCP:
        return False
    header = 4 * (packet[0] & 15)
    low, high = link.closed
    return low <= min(struct.unpack_from("!HH", packet, header)) <= high


def relay(ends: list[int]) -> None:
    """Copy packets between two TUN devices until standard input ends."""
    link, chance = Link(), random.Random(0)
    waiting: list[tuple[float, int, int, bytes]] = []  # due time, number, device, packet
    idle_at = [0.0, 0.0]  # when each direction has sent what it queues
    number = 0
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, device, packet = heapq.heappop(waiting)
            os.write(device, packet)
        ready, _, _ = select.select([*ends, 0], [], [], waiting[0][0] - now if waiting else None)
        if 0 in ready:
            line = sys.stdin.buffer.readline()
            if not line:
                return
            link = Link(**json.loads(line))
            print("set", flush=True)
        for direction, device in enumerate(ends):
            if device not in ready:
                continue
            packet, now = os.read(device, MTU), time.monotonic()
            if drops(link, packet, chance):
                continue
            due = now + link.delay_s
            if link.rate is not None:
                sent_at = max(now, idle_at[direction]) + len(packet) / link.rate
                if sent_at - now > QUEUE_S:
                    continue
                idle_at[direction], due = sent_at, sent_at + link.delay_s
            number += 1
            heapq.heappush(waiting, (due, number, ends[1 - direction], packet))


def connect(number: int, pid: int) -> int:
    """The file of a new TUN device, which is `link0` in the namespace of process `pid`."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    name = f"bf{os.getpid()}-{number}"
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    inside = ("nsenter", f"--net=/proc/{pid}/ns/net", "ip")
    for command in (
        ("ip", "link", "set", name, "netns", str(pid), "name", INTERFACE),
        (*inside, "link", "set", "lo", "up"),
        (*inside, "address", "add", f"{ADDRESSES[number]}/24", "dev", INTERFACE),
        (*inside, "link", "set", INTERFACE, "mtu", str(MTU), "up"),
    ):
        subprocess.run(command, check=True)
    return device


if __name__ == "__main__":
    devices = [connect(number, int(pid)) for number, pid in enumerate(sys.argv[1:])]
    print("connected", flush=True)
    relay(devices)
