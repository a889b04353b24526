"""Nodes without Slurm: their rendezvous, and the attempts that node 0 records."""

import json
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import pods
from bifrost.slurm import SlurmError, exit_record, nodes
from bifrost.slurm.exit_codes import DONE, FAILED, HUNG, LOCKED, LOST, STOPPED, USAGE
from bifrost.slurm.node_attempt import begin, end
from bifrost.slurm.nodes import Node, join_nodes


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "RETRY_S", 0.02)
    monkeypatch.setattr(nodes, "READ_S", 0.5)


class Meeting:
    """Nodes as threads; `begun` is set by node 0."""

    def __init__(self, count: int) -> None:
        self.count = count
        address, port = pods.free_address().split(":")
        self.address, self.port = address, int(port)
        self.begun = threading.Event()
        self.pool = ThreadPoolExecutor(count + 1)

    def start(self, rank: int, problem: str = "") -> Future:
        def decide() -> None:
            self.begun.set()
            if problem:
                raise SlurmError(problem)

        return self.pool.submit(join_nodes, Node(rank, self.count, self.address, self.port), decide)

    def connect(self, text: bytes) -> socket.socket:
        """A connection to node 0, once it listens."""
        while True:
            try:
                connection = socket.create_connection((self.address, self.port))
            except ConnectionRefusedError:
                continue
            connection.sendall(text)
            return connection


def test_nobody_begins_before_all_have_joined() -> None:
    meeting = Meeting(3)
    early = meeting.start(2)
    first = meeting.start(0)
    assert not meeting.begun.wait(0.3) and not early.done() and not first.done()
    late = meeting.start(1)
    assert [each.result(10) for each in (first, early, late)] == [None] * 3 and meeting.begun.is_set()


def test_a_refusal_of_node_0_is_raised_on_all() -> None:
    meeting = Meeting(2)
    started = [meeting.start(1), meeting.start(0, "three attempts without a checkpoint")]
    for each in started:
        with pytest.raises(SlurmError, match=r"^three attempts without a checkpoint$"):
            each.result(10)


def test_a_node_alone_begins_at_once() -> None:
    meeting = Meeting(1)
    assert meeting.start(0).result(10) is None and meeting.begun.is_set()


def test_strangers_and_nodes_that_were_replaced_do_not_count() -> None:
    meeting = Meeting(3)
    first = meeting.start(0)
    for text in (b"GET / HTTP/1.1\r\n", b"0", b"3", b"-1"):
        meeting.connect(text)
    gone = meeting.connect(b"1")
    gone.close()
    other = meeting.start(1)  # in place of the one that is gone
    assert not meeting.begun.wait(0.5)
    assert [each.result(10) for each in (meeting.start(2), first, other)] == [None] * 3


def test_node_0_may_be_replaced_while_others_wait() -> None:
    meeting = Meeting(2)
    with socket.create_server((meeting.address, meeting.port)) as before:
        waiting = meeting.start(1)
        before.accept()[0].close()
    assert [meeting.start(0).result(10), waiting.result(10)] == [None, None]


def test_a_port_that_another_process_has_is_refused() -> None:
    meeting = Meeting(2)
    with socket.create_server(("", meeting.port)), pytest.raises(SlurmError, match=f"port {meeting.port} of node 0"):
        meeting.start(0).result(10)


def checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08}").mkdir(parents=True)


def test_three_attempts_without_a_checkpoint_are_the_last(tmp_path: Path) -> None:
    for code in (-9, FAILED, HUNG):
        end(tmp_path, code, begin(tmp_path, 2, 0.0))
    with pytest.raises(SlurmError, match="3 attempts without a checkpoint after step 0"):
        begin(tmp_path, 2, 0.0)
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert stopped["code"] == USAGE and "after step 0" in stopped["reason"]
    checkpoint(tmp_path, 10)
    begin(tmp_path, 2, 0.0)
    assert not (tmp_path / "stopped.json").exists()
    assert len({each["attempt"] for each in exit_record.attempts(tmp_path)}) == 4


def test_killed_nodes_count_and_a_new_manifest_resets_the_count(tmp_path: Path) -> None:
    for _ in range(3):
        begin(tmp_path, 2, 0.0)  # and no end: its node was killed
    with pytest.raises(SlurmError):
        begin(tmp_path, 2, 0.0)
    last = exit_record.attempts(tmp_path)[-1]["time"]
    begin(tmp_path, 2, last + 1e-3)


def test_preemptions_do_not_count(tmp_path: Path) -> None:
    for _ in range(5):
        end(tmp_path, STOPPED, begin(tmp_path, 2, 0.0))
    begin(tmp_path, 2, 0.0)


@pytest.mark.parametrize(
    ("code", "recorded", "expected", "final"),
    [
        (DONE, None, DONE, True),
        (USAGE, None, USAGE, True),
        (LOCKED, None, LOCKED, True),
        (FAILED, None, FAILED, False),
        (-9, None, 137, False),
        (LOST, None, LOST, False),
        (FAILED, FAILED, FAILED, True),  # such as a diverged run, recorded by a rank
        (FAILED, USAGE, USAGE, True),  # this node's ranks lost one of another node
        (FAILED, HUNG, HUNG, False),
    ],
)
def test_what_the_first_failed_rank_recorded_decides(
    code: int, recorded: int | None, expected: int, final: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every node alike: SkyPilot starts a task again if any node ends with the code for that."""
    attempt = begin(tmp_path, 2, 0.0)
    if recorded is not None:
        monkeypatch.setenv("BIFROST_RUN", str(tmp_path))
        monkeypatch.setenv("RANK", "3")
        exit_record.record_outcome(recorded, "a reason")
    for node in (None, attempt):
        found = end(tmp_path, code, node)
        assert (found.code, found.final) == (expected, final)
        assert recorded is None or found.reason == "rank 3: a reason"
    (record,) = exit_record.attempts(tmp_path)
    assert record["decision"] == ("done" if code == DONE else "stopped" if final else "again")
    assert (tmp_path / "stopped.json").exists() == (record["decision"] == "stopped")
    begin(tmp_path, 2, 0.0)
    assert not (tmp_path / exit_record.OUTCOME).exists()  # the next attempt is not judged by this one's
