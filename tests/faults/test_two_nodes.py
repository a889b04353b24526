"""The link between two namespaces does what its settings state, and nothing of it outlives its process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

import two_nodes
from cable import Link
from two_nodes import ADDRESSES, TwoNodes

pytestmark = pytest.mark.skipif(two_nodes.missing() is not None, reason=str(two_nodes.missing()))

ANSWER = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
    datagrams.bind(("", 9))
    print("ready", flush=True)
    while True:
        datagrams.sendto(*datagrams.recvfrom(2000))
"""
ASK = """
import socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
    datagrams.settimeout(0.5)
    datagrams.connect((sys.argv[1], 9))
    began = time.monotonic()
    for number in range(int(sys.argv[2])):
        datagrams.send(bytes(1000))
    came = 0
    try:
        while came < int(sys.argv[2]) and datagrams.recv(2000):
            came, last = came + 1, time.monotonic()
    except TimeoutError:
        pass
    print(came, last - began if came else 0)
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with TwoNodes() as nodes:
        yield nodes


@pytest.fixture
def ask(nodes: TwoNodes) -> Iterator[object]:
    """ask(N) sends N datagrams of a kilobyte to node 2 and back; returns how many arrived, and seconds to the last."""
    command = [*nodes.inside(1), sys.executable, "-c", ANSWER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout and server.stdout.readline() == "ready\n"

        def ask(count: int) -> tuple[int, float]:
            asked = [*nodes.inside(0), sys.executable, "-c", ASK, ADDRESSES[1], str(count)]
            came, seconds = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
            return int(came), float(seconds)

        yield ask
        server.kill()
    nodes.set(Link())


def test_faults_of_the_link(nodes: TwoNodes, ask) -> None:
    assert ask(20)[0] == 20
    nodes.set(Link(delay_s=0.05))
    came, seconds = ask(1)
    assert came == 1 and 0.1 <= seconds < 0.3
    nodes.set(Link(rate=50_000))  # 18 datagrams of 1,028 bytes: 0.37 s there, and the last one 0.02 s back
    came, seconds = ask(18)
    assert came == 18 and 0.38 <= seconds < 0.7
    nodes.set(Link(loss=0.2))
    # 0.8 x 0.8 of 200 is 128. Few at a time: a socket's buffer drops what exceeds it, too.
    assert 80 <= sum(ask(20)[0] for _ in range(10)) <= 170
    nodes.set(Link(loss=1))
    assert ask(3)[0] == 0


CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=0.5).close()
except OSError as error:
    print(type(error).__name__)
"""


def test_closed_ports_do_not_answer_and_the_others_refuse(nodes: TwoNodes) -> None:
    def connect(port: int) -> str:
        asked = [*nodes.inside(0), sys.executable, "-c", CONNECT, ADDRESSES[1], str(port)]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    nodes.set(Link(closed=(5000, 5001)))
    assert [connect(port) for port in (4999, 5000, 5001, 5002)] == [
        "ConnectionRefusedError",
        "TimeoutError",
        "TimeoutError",
        "ConnectionRefusedError",
    ]
    nodes.set(Link())
    assert connect(5000) == "ConnectionRefusedError"


STAY = """
import signal, time, two_nodes
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background starts its children without it
with two_nodes.TwoNodes() as nodes:
    print(*[process.pid for process in nodes._processes], flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_its_process(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STAY], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as owner:
        assert owner.stdout
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 3 and all(os.path.exists(f"/proc/{pid}") for pid in pids)
        owner.send_signal(number)
        owner.wait(10)
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    shown = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    assert f"bf{pids[2]}-" not in shown
