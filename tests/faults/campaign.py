"""Random kills in many short runs, at every write boundary and at other times. The result of each run must be bitwise
equal to that of an uninterrupted one.

    python tests/faults/campaign.py --kills 1000 --folder FOLDER --report docs/faults-report.md

With --mixture the runs are of stage 2, on a mixture of two sources in aspect-ratio buckets; else of stage 1.
An interrupted campaign resumes in the same folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import boundaries
import ranked
from bifrost.trainer.monitors.metrics import read_metrics

RANKS = 2
GRACE_S = 3.0  # for ranks that lost another rank; the launcher gives them 10
PATIENCE_S = 120.0  # timeout for all expected events
STEPS_PER_ATTEMPT = 5  # an attempt that has not reached its fault by then is killed
WAYS = ("go", "stop", "end")
EXACT = ("step", "samples", "loss", "grad_norm", "lr", "data_digest", "skipped_steps")


@dataclass
class Kill:
    """One attempt, how it was ended, and the errors found afterwards."""

    moment: str
    """boundary, step, start, worker or signal. Not a kill: `damage`, a flipped bit in the newest checkpoint, and
    `none`, an attempt that ran to the last step."""
    detail: str
    victims: list[int]
    aimed: str
    """The boundary of the planned kill; if the attempt did not reach it, it was killed at another moment."""
    way: str
    """The planned way there: `go`, a few steps; `stop`, a stop signal after them; `end`, to the last step."""
    before: str
    """How the previous attempt was ended: the boundary, or else the moment."""
    codes: list[int | None]
    began: int | None
    """Step from which it resumed; None when it was killed before it logged that."""
    steps: int
    """Number of steps that it logged."""
    compared: int = 0
    """Number of checkpoints compared with those of the uninterrupted run afterwards."""
    met: dict[str, list[int]] = field(default_factory=dict)
    """Write boundaries that the attempt reached -> ranks that reached them."""
    wrong: list[str] = field(default_factory=list)
    recovery_s: float | None = None
    """Seconds from the previous kill to the first new step."""


class Campaign:
    """Kills of runs of the `bifrost` command with `arguments`: `steps` steps of recipe `name`, each run with at most
    `kills_per_run` kills."""

    def __init__(self, folder: Path, arguments: list[str], name: str, steps: int, kills_per_run: int) -> None:
        self.folder, self.name, self.steps, self.kills_per_run = folder, name, steps, kills_per_run
        self.arguments = [*arguments, f"steps={steps}"]
        self.log = folder / "runs.jsonl"
        self.kills: list[Kill] = []
        self.runs: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        for line in self.log.read_text().splitlines() if self.log.exists() else []:
            self._add(json.loads(line))
        self.uninterrupted = self._train_uninterrupted()
        lines = read_metrics(self.uninterrupted / "metrics.jsonl")
        self.startup_s = next(line["startup_s"] for line in lines if line.get("event") == "start")
        self.step_s = statistics.median(line["step_s"] for line in _steps(lines))

    def until(self, kills: int) -> None:
        """Make complete runs until at least `kills` kills were sent."""
        while self.sent() < kills:
            run = _Run(self, len(self.runs)).play()
            with open(self.log, "a") as file:
                file.write(json.dumps(run) + "\n")
            self._add(run)
            print(f"{self.sent()} kills, {len(self.runs)} runs, {len(self.wrong())} errors", flush=True)

    def sent(self) -> int:
        return sum(kill.moment not in ("damage", "none") for kill in self.kills)

    def wrong(self) -> list[str]:
        """All errors found after a kill or at the end of a run."""
        return [text for kill in self.kills for text in kill.wrong] + [
            text for run in self.runs for text in run["wrong"]
        ]

    def met(self) -> dict[str, set[int]]:
        """Every write boundary that an attempt reached -> ranks that reached it."""
        return _united([_boundaries(self.uninterrupted.parent), *(kill.met for kill in self.kills)])

    def hits(self) -> Counter[str]:
        """Number of kills at each write boundary that was reached."""
        hits = Counter(dict.fromkeys(self.met(), 0))
        hits.update(kill.detail for kill in self.kills if kill.moment == "boundary")
        return hits

    def _add(self, run: dict[str, Any]) -> None:
        self.kills += [Kill(**kill) for kill in run["kills"]]
        self.runs.append(run)

    def _train_uninterrupted(self) -> Path:
        place = self.folder / "uninterrupted"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        arguments = [*self.arguments, f"runs_dir={place}", "checkpoint.every=1", f"checkpoint.keep={self.steps}"]
        ended = ranked.run(victim, RANKS, arguments, str(place / self.name), str(place), None)
        assert [rank.code for rank in ended] == [0] * RANKS, ended[0].err
        return place / self.name


class _Run:
    """One run from scratch to its last step, with repeated kills."""

    def __init__(self, campaign: Campaign, number: int) -> None:
        self.campaign = campaign
        self.chance = random.Random(number)
        self.place = campaign.folder / "shaken"
        self.folder = self.place / campaign.name
        self.settings = {
            "checkpoint.every": self.chance.choice((1, 1, 2, 3)),
            "checkpoint.keep": self.chance.choice((1, 2, 3)),
            "data.workers": int(self.chance.random() < 0.15),
        }
        self.workers = self.settings["data.workers"]
        self.damaged: dict[int, tuple[Path, bytes]] = {}  # step -> its damaged file and the content
        self.kills: list[Kill] = []

    def play(self) -> dict[str, Any]:
        """Play the run; returns its record for the log."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        begun, before = time.time(), None
        while True:
            newest = max(self.whole(), default=0)
            attempt = _Attempt(self, len(self.kills))
            kill = attempt.until_killed(*self._plan())
            kill.met = _boundaries(attempt.folder)
            if attempt.began not in (None, newest):
                kill.wrong.append(f"resume: from step {attempt.began} although step {newest} was saved")
            if before is not None and attempt.first_step_at:
                kill.recovery_s = attempt.first_step_at - before
            self.kills.append(kill)
            if kill.moment == "none":
                break
            kill.compared = len(self.whole())
            kill.wrong += self._torn()
            before = attempt.killed_at
            if len(self.whole()) > 1 and self.chance.random() < 0.04:
                self.kills.append(self._damage())
        return {
            "settings": self.settings,
            "seconds": time.time() - begun,
            "wrong": differences(self.folder, self.campaign.uninterrupted, self.damaged),
            "kills": [asdict(kill) for kill in self.kills],
        }

    def _plan(self) -> tuple[str, str, str, list[int]]:
        """Moment of the next kill; for one at a boundary, the way to it and its label; the victims.

        Which boundaries an attempt reaches depends on what the previous one left behind, and some are reached only when
        it stops or ends. If the same situation was seen before, choose among the boundaries reached then, the least hit
        first."""
        if len(self.kills) >= self.campaign.kills_per_run:
            return "none", "end", "", []
        moments = ["boundary"] * 6 + ["step", "step", "start", "signal"]
        moment = "boundary" if not self.kills else self.chance.choice(moments + ["worker"] * 4 * self.workers)
        if moment != "boundary":
            return moment, "stop" if moment == "signal" else "go", "", self.chance.choice(([0], [1], [0, 1]))
        so_far, before = [*self.campaign.kills, *self.kills], self.before()
        hits = Counter(kill.detail for kill in so_far if kill.moment == "boundary")
        missed = Counter(
            (kill.way, kill.aimed) for kill in so_far if kill.before == before and kill.aimed != kill.detail
        )
        alike = {way: _united(kill.met for kill in so_far if (kill.before, kill.way) == (before, way)) for way in WAYS}
        known = {(way, label): ranks for way in WAYS for label, ranks in alike[way].items()}
        known = known or {("go", label): ranks for label, ranks in self.campaign.met().items()}
        way, label = min(known, key=lambda to: (hits[to[1]] + missed[to], WAYS.index(to[0]), self.chance.random()))
        dying = self.chance.choice(sorted(known[way, label]))
        return moment, way, label, [dying, *([1 - dying] if self.chance.random() < 0.3 else [])]

    def before(self) -> str:
        """How the latest attempt was ended."""
        kills = [kill for kill in self.kills if kill.moment != "damage"]
        return kills[-1].detail or kills[-1].moment if kills else ""

    def _saved(self) -> set[int]:
        folder = self.folder / "checkpoints"
        return {int(path.name[5:]) for path in folder.glob("step-*")} if folder.is_dir() else set()

    def whole(self) -> set[int]:
        """Steps of checkpoints that were not damaged, or have been replaced since."""
        for step, (file, content) in list(self.damaged.items()):
            if not file.exists() or file.read_bytes() != content:
                del self.damaged[step]
        return self._saved() - self.damaged.keys()

    def _damage(self) -> Kill:
        """Flip one bit of the newest checkpoint."""
        step = max(self._saved())
        folder = self.folder / f"checkpoints/step-{step:08d}"
        file = self.chance.choice(sorted(folder.iterdir()))
        content = bytearray(file.read_bytes())
        content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
        file.write_bytes(content)
        self.damaged[step] = (file, bytes(content))
        return Kill("damage", boundaries.numberless(f"{folder.name}/{file.name}"), [], "", "", "", [], None, 0)

    def _torn(self) -> list[str]:
        whole = self.whole()
        return [text for step, text in torn(self.folder, self.campaign.uninterrupted).items() if step in whole]


class _Attempt:
    """One attempt of a run and its fault."""

    def __init__(self, run: _Run, number: int) -> None:
        self.run, self.chance = run, run.chance
        self.folder = run.place / f"attempt-{number}"
        self.folder.mkdir()
        self.metrics = run.folder / "metrics.jsonl"
        self.began: int | None = None
        self.first_step_at: float | None = None
        self.last = 0  # step logged
        self.killed_at = 0.0

    def until_killed(self, moment: str, way: str, aimed: str, victims: list[int]) -> Kill:
        """Start, wait for the moment of the fault, inject it, and end the other ranks as the launcher would."""
        campaign = self.run.campaign
        again = way == "go" and " checkpoints/" in aimed  # reached by every save
        doom = (aimed, victims[0], self.chance.choice((1, 1, 2, 3)) if again else 1) if aimed else None
        arguments = [*campaign.arguments, f"runs_dir={self.run.place}"]
        arguments += [f"{key}={value}" for key, value in self.run.settings.items()]
        self.begun = time.time()
        processes = ranked.start(
            victim, RANKS, arguments, str(self.run.folder), str(self.folder), doom, folder=self.folder
        )
        wrong: list[str] = []

        def over() -> bool:
            return not all(process.is_alive() for process in processes)

        def within(seconds: float, true: Callable[[], bool]) -> None:
            if not _wait(true, seconds):
                wrong.append(f"hang: {moment} {aimed}: nothing for {seconds:.0f} s\n{self._errors()}")

        def ended() -> bool:
            return not any(process.is_alive() for process in processes)

        number, detail = signal.SIGKILL, ""
        if moment == "none":
            within(10 * PATIENCE_S, ended)
        elif moment == "start":
            _wait(over, self.chance.uniform(0, 1.5) * campaign.startup_s)
        elif way == "end":
            within(10 * PATIENCE_S, over)
        else:
            steps = STEPS_PER_ATTEMPT if (moment, way) == ("boundary", "go") else self.chance.choice((1, 1, 2, 4))
            within(PATIENCE_S, lambda: over() or self._steps() >= steps)
            if moment != "boundary":
                _wait(over, self.chance.uniform(0, 1.5) * campaign.step_s)
        if way == "stop":
            number = self.chance.choice((signal.SIGTERM, signal.SIGUSR1))
            self._send(number, [processes[rank] for rank in victims])
            within(PATIENCE_S, over)
        if over():  # by the fault, by the signal or after its last step: anything else is an error
            _wait(lambda: not processes[victims[0]].is_alive() if aimed else ended(), GRACE_S)
            codes = [process.exitcode for process in processes]
            dead = aimed and codes[victims[0]] == -signal.SIGKILL
            meant = dead or 0 in codes or (way == "stop" and {75, -number} & {*codes})
            assert meant, f"{moment} {aimed}: ended unexpectedly with {codes}\n{self._errors()}"
            if dead:
                detail = aimed
        elif moment == "worker" and (worker := _child(processes[victims[0]].pid)):
            os.kill(worker, signal.SIGKILL)
            self.killed_at = time.time()
            within(PATIENCE_S, ended)
        if aimed and not detail:  # the attempt did not reach it, for example because there was nothing to remove yet
            moment = "signal" if way == "stop" else "step"
        if moment in ("boundary", "step", "start", "worker"):
            self._send(signal.SIGKILL, [processes[rank] for rank in victims])
        _wait(ended, PATIENCE_S if moment == "signal" else GRACE_S)
        for process in processes:
            process.kill()
        codes = [rank.code for rank in ranked.finish(processes, self.folder)]
        if codes == [0] * RANKS:
            moment = "none"
        if moment == "signal" and codes == [75] * RANKS:
            detail = signal.Signals(number).name
        steps = self._steps()
        if moment == "signal" and detail and self.last not in self.run.whole():
            wrong.append(f"resume: stopped at step {self.last} without having saved it")
        return Kill(moment, detail, victims, aimed, way, self.run.before(), codes, self.began, steps, wrong=wrong)

    def _send(self, number: int, processes: list[Any]) -> None:
        for process in processes:
            if process.is_alive():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)
        self.killed_at = self.killed_at or time.time()

    def _errors(self) -> str:
        return "\n".join(file.read_text()[-2000:] for file in sorted(self.folder.glob("*.err")))

    def _steps(self) -> int:
        """Number of steps that this attempt has logged."""
        mine = [line for line in read_metrics(self.metrics) if line["time"] >= self.begun]
        starts = [line["step"] for line in mine if line.get("event") == "start"]
        steps = _steps(mine)
        if starts:
            self.began = starts[0]
        if steps:
            self.first_step_at, self.last = steps[0]["time"], steps[-1]["step"]
        return len(steps)


def victim(arguments: list[str], run: str, folder: str, doom: tuple[str, int, int] | None) -> None:
    """A rank that records the write boundaries it reaches, and kills itself at the given one."""
    rank, seen = int(os.environ["RANK"]), Counter[str]()
    note = os.open(f"{folder}/boundaries-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def boundary(operation: str, path: str) -> None:
        label = boundaries.label(operation, path, run)
        if label is None:
            return
        seen[label] += 1
        if seen[label] == 1:
            os.write(note, f"{label}\n".encode())
        if doom and doom[0] == label and doom[1] == rank and seen[label] == doom[2]:
            os.kill(os.getpid(), signal.SIGKILL)

    boundaries.install(boundary)
    ranked.command(arguments)


def _boundaries(folder: Path) -> dict[str, list[int]]:
    """Records of the attempts in `folder`: write boundary -> ranks that reached it."""
    met: dict[str, list[int]] = {}
    for file in folder.rglob("boundaries-?"):
        for label in file.read_text().splitlines():
            met[label] = sorted({*met.get(label, []), int(file.name[-1])})
    return met


def differences(run: Path, uninterrupted: Path, damaged: Collection[int] = ()) -> list[str]:
    """Differences of a finished run from the uninterrupted one, in step lines and checkpoints except `damaged` ones."""
    found, wanted = (
        [tuple(line[key] for key in EXACT) for line in _steps(read_metrics(folder / "metrics.jsonl"))]
        for folder in (run, uninterrupted)
    )
    wrong = [f"line: {a} instead of {b}" for a, b in zip(found, wanted, strict=False) if a != b]
    if len(found) != len(wanted):
        wrong.append(f"line: {len(found)} steps logged instead of {len(wanted)}")
    last = f"checkpoints/step-{len(wanted):08d}"
    if not (run / last).is_dir():
        wrong.append("resume: the last step was not saved")
    return wrong + [text for step, text in torn(run, uninterrupted).items() if step not in damaged]


def torn(run: Path, uninterrupted: Path) -> dict[int, str]:
    """Step -> how its checkpoint, if under its final name, differs from that of the uninterrupted run."""
    found = {}
    for here in sorted((run / "checkpoints").glob("step-*")):
        there = uninterrupted / "checkpoints" / here.name
        names = {file.name for folder in (here, there) for file in folder.iterdir()}
        different = [name for name in sorted(names) if _content(here / name) != _content(there / name)]
        if different:
            found[int(here.name[5:])] = f"torn: {here.name} differs in {', '.join(different)}"
    return found


def _steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "event" not in line]


def _content(file: Path) -> Any:
    """The content that must be equal in two runs, without times and the folder's name."""
    if not file.exists():
        return None
    if file.suffix != ".json":
        return file.read_bytes()
    try:
        content = json.loads(file.read_bytes())
        if file.name == "state.json":
            progress = content["progress"]
            return [progress[key] for key in ("step", "samples", "digest", "skipped_steps")], content["updates"]
        entries = content["files"].items()
        return content["step"], {name: entry for name, entry in entries if not name.endswith(".json")}
    except (ValueError, KeyError):
        return "damaged"


def _united(seen: Iterable[Mapping[str, Iterable[int]]]) -> dict[str, set[int]]:
    united: dict[str, set[int]] = {}
    for met in seen:
        for label, ranks in met.items():
            united.setdefault(label, set()).update(ranks)
    return united


def _wait(true: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition; returns whether it became true in time."""
    limit = time.monotonic() + seconds
    while not true():
        if time.monotonic() >= limit:
            return False
        time.sleep(0.005)
    return True


def _child(pid: int) -> int | None:
    """A child process of a rank, which is a worker of its loader."""
    try:
        tasks = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return None
    children = [int(child) for text in tasks for child in text.split()]
    return children[-1] if children else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="minimum number of kills; the last run is completed")
    parser.add_argument("--steps", type=int, default=30, help="steps per run")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/faults"), help="folder of the campaign, in which it resumes"
    )
    parser.add_argument("--report", type=Path, help="file for the report; default report.md in FOLDER")
    parser.add_argument("--hardware", default="this machine", help="description of the hardware for the report")
    parser.add_argument("--mixture", action="store_true", help="runs of stage 2 on two sources in buckets")
    given = parser.parse_args()
    # As in the tests: interpreted kernels, on the CPU, without network.
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    import campaign_report
    import mixed_run
    import runs
    import small_model
    import small_shards

    folder = given.folder.resolve()
    if given.mixture:
        recipe, arguments, about = mixed_run.RECIPE, mixed_run.arguments(folder), campaign_report.MIXTURE
    else:
        if not (folder / "shards").is_dir():
            small_shards.save(folder / "shards")
        settings = (*small_model.settings(folder / "backbone"), "global_batch=4", "ema.decay=0.9")
        recipe, arguments = "tiny-mllm", runs.arguments(folder / "shards", folder, *settings)
        about = campaign_report.STAGE_1
    campaign = Campaign(folder, arguments, recipe, given.steps, kills_per_run=30)
    campaign.until(given.kills)
    text = campaign_report.page(campaign, about, given.kills, given.hardware)
    (given.report or folder / "report.md").write_text(text)
    if campaign.wrong():
        raise SystemExit("\n".join(campaign.wrong()))


if __name__ == "__main__":
    main()
