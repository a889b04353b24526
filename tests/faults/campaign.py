"""Random kills over many short runs, at every write boundary among other moments. Each run must end like the one that
nobody disturbed, to the bit.

    python tests/faults/campaign.py --kills 1000 --folder FOLDER --report docs/faults-report.md

A campaign that was interrupted goes on in the same folder.
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
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import boundaries
import ranked
from bifrost.trainer.monitors.metrics import read_metrics

RANKS = 2
GRACE_S = 3.0  # for ranks that lost another; the launcher gives them 10
PATIENCE_S = 120.0  # for anything that should happen
STEPS_A_START = 5  # a start whose fault has not come by then is killed as it is
EXACT = ("step", "samples", "loss", "grad_norm", "lr", "digest", "skipped_steps")


@dataclass
class Kill:
    """One start, how it was ended, and what was wrong afterwards."""

    moment: str
    """boundary, step, start, worker, signal; `damage`: no kill, a byte of the newest checkpoint was flipped."""
    detail: str
    victims: list[int]
    aimed: str
    """The boundary that it was to die at; another moment when the start did not come there."""
    codes: list[int | None]
    began: int | None
    """Step that it went on from; None when it was killed before it could say so."""
    steps: int
    """Steps that it logged."""
    compared: int = 0
    """Checkpoints compared with the undisturbed run's afterwards."""
    wrong: list[str] = field(default_factory=list)
    recovery_s: float | None = None
    """From the kill before this start to this start's first new step."""


class Campaign:
    """Kills over the run that `arguments` of the `bifrost` command make, `steps` steps of recipe `name`; each is left
    alone after `kills_a_run`."""

    def __init__(self, folder: Path, arguments: list[str], name: str, steps: int, kills_a_run: int) -> None:
        self.folder, self.name, self.steps, self.kills_a_run = folder, name, steps, kills_a_run
        self.arguments = [*arguments, f"steps={steps}"]
        self.log = folder / "runs.jsonl"
        self.kills: list[Kill] = []
        self.runs: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        for line in self.log.read_text().splitlines() if self.log.exists() else []:
            self._add(json.loads(line))
        self.undisturbed = self._train_undisturbed()
        lines = read_metrics(self.undisturbed / "metrics.jsonl")
        self.startup_s = next(line["startup_s"] for line in lines if line.get("event") == "start")
        self.step_s = statistics.median(line["step_s"] for line in _steps(lines))

    def until(self, kills: int) -> None:
        """Whole runs, until that many kills were sent."""
        while self.sent() < kills:
            run = _Run(self, len(self.runs)).play()
            with open(self.log, "a") as file:
                file.write(json.dumps(run) + "\n")
            self._add(run)
            print(f"{self.sent()} kills, {len(self.runs)} runs, {len(self.wrong())} things wrong", flush=True)

    def sent(self) -> int:
        return sum(kill.moment != "damage" for kill in self.kills)

    def wrong(self) -> list[str]:
        """All that was wrong after a kill or at the end of a run."""
        return [text for kill in self.kills for text in kill.wrong] + [
            text for run in self.runs for text in run["wrong"]
        ]

    def met(self) -> dict[str, set[int]]:
        """Every write boundary that a start came past, and the ranks that did."""
        met: dict[str, set[int]] = {}
        for seen in [_boundaries(self.undisturbed.parent), *(run["boundaries"] for run in self.runs)]:
            for label, ranks in seen.items():
                met.setdefault(label, set()).update(ranks)
        return met

    def hits(self) -> Counter[str]:
        """Kills at each write boundary that a start came past."""
        hits = Counter(dict.fromkeys(self.met(), 0))
        hits.update(kill.detail for kill in self.kills if kill.moment == "boundary")
        return hits

    def _add(self, run: dict[str, Any]) -> None:
        self.kills += [Kill(**kill) for kill in run["kills"]]
        self.runs.append(run)

    def _train_undisturbed(self) -> Path:
        place = self.folder / "undisturbed"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        arguments = [*self.arguments, f"runs_dir={place}", "checkpoint.every=1", f"checkpoint.keep={self.steps}"]
        ended = ranked.run(victim, RANKS, arguments, str(place / self.name), str(place), None)
        assert [rank.code for rank in ended] == [0] * RANKS, ended[0].err
        return place / self.name


class _Run:
    """One run from nothing to its last step, killed on the way over and over."""

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
        self.damaged: dict[int, tuple[Path, bytes]] = {}  # step -> its damaged file, and what is in it
        self.kills: list[Kill] = []
        self.hits = campaign.hits()
        self.aims = Counter(kill.aimed for kill in campaign.kills)

    def play(self) -> dict[str, Any]:
        """The run's record for the log."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        begun, before = time.time(), None
        while True:
            newest = max(self.whole(), default=0)
            start = _Start(self, len(self.kills))
            kill = start.until_killed(*self._plan())
            if start.began not in (None, newest):
                kill.wrong.append(f"resume: from step {start.began} where step {newest} was saved")
            if before is not None and start.first_step_at:
                kill.recovery_s = start.first_step_at - before
            if all(code == 0 for code in kill.codes):
                break
            kill.compared = len(self.whole())
            kill.wrong += self._torn()
            self.kills.append(kill)
            self.hits[kill.detail] += kill.moment == "boundary"
            self.aims[kill.aimed] += 1
            before = start.killed_at
            if len(self.whole()) > 1 and self.chance.random() < 0.04:
                self.kills.append(self._damage())
        return {
            "settings": self.settings,
            "seconds": time.time() - begun,
            "boundaries": _boundaries(self.place),
            "wrong": differences(self.folder, self.campaign.undisturbed, self.damaged),
            "kills": [asdict(kill) for kill in self.kills],
        }

    def _plan(self) -> tuple[str, str, list[int]]:
        """Moment, boundary and victims of the next kill. Boundaries that had the fewest come first, those that only
        the first start of a run comes past too."""
        if len(self.kills) >= self.campaign.kills_a_run:
            return "none", "", []
        met = self.campaign.met()
        moments = ["boundary"] * 6 + ["step", "step", "start", "signal"]
        moment = "boundary" if not self.kills else self.chance.choice(moments + ["worker"] * 4 * self.workers)
        if moment != "boundary":
            return moment, "", self.chance.choice(([0], [1], [0, 1]))
        tries = self.aims if self.kills else self.hits
        label = min(met, key=lambda label: (tries[label], self.chance.random()))
        dying = self.chance.choice(sorted(met[label]))
        return moment, label, [dying, *([1 - dying] if self.chance.random() < 0.3 else [])]

    def _saved(self) -> set[int]:
        folder = self.folder / "checkpoints"
        return {int(path.name[5:]) for path in folder.glob("step-*")} if folder.is_dir() else set()

    def whole(self) -> set[int]:
        """Those that we did not damage, or that were replaced since."""
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
        return Kill("damage", boundaries.numberless(f"{folder.name}/{file.name}"), [], "", [], None, 0)

    def _torn(self) -> list[str]:
        whole = self.whole()
        return [text for step, text in torn(self.folder, self.campaign.undisturbed).items() if step in whole]


class _Start:
    """One start of a run and the fault that it meets."""

    def __init__(self, run: _Run, number: int) -> None:
        self.run, self.chance = run, run.chance
        self.folder = run.place / f"start-{number}"
        self.folder.mkdir()
        self.metrics = run.folder / "metrics.jsonl"
        self.began: int | None = None
        self.first_step_at: float | None = None
        self.last = 0  # step logged
        self.killed_at = 0.0

    def until_killed(self, moment: str, detail: str, victims: list[int]) -> Kill:
        """Start, wait for the fault's moment, let it happen, end what is left as the launcher would."""
        campaign, aimed = self.run.campaign, detail
        again = self.run.hits[detail] > 0
        doom = (detail, victims[0], self.chance.choice((1, 2, 3, 7)) if again else 1) if detail else None
        arguments = [*campaign.arguments, f"runs_dir={self.run.place}"]
        arguments += [f"{key}={value}" for key, value in self.run.settings.items()]
        self.begun = time.time()
        processes = ranked.start(
            victim, RANKS, arguments, str(self.run.folder), str(self.folder), doom, folder=self.folder
        )

        def over() -> bool:
            return not all(process.is_alive() for process in processes)

        grace, number = GRACE_S, signal.SIGKILL
        if moment == "none":
            _wait(lambda: not any(process.is_alive() for process in processes), 10 * PATIENCE_S)
        elif moment == "start":
            _wait(over, self.chance.uniform(0, 1.5) * campaign.startup_s)
        else:
            steps = self.chance.choice((1, 1, 2, 4))
            if moment == "boundary":  # one that was missed before may lie at a run's end
                steps = STEPS_A_START if again or self.run.aims[aimed] < 2 else campaign.steps
            _wait(lambda: over() or self._steps() >= steps, PATIENCE_S)
            if moment != "boundary":
                _wait(over, self.chance.uniform(0, 1.5) * campaign.step_s)
        if over():  # by the fault, or with its last step: anything else is not our doing
            _wait(lambda: not any(process.is_alive() for process in processes), 0.5)
            ended = [process.exitcode for process in processes]
            meant = 0 in ended or (moment == "boundary" and ended[victims[0]] == -signal.SIGKILL)
            assert meant, f"{moment} {detail}: ended by itself with {ended}\n{self._errors()}"
        if moment == "boundary" and not over():
            moment, detail = "step", ""  # the start did not come there: nothing to remove yet, say
        if moment == "signal":
            number, grace = self.chance.choice((signal.SIGTERM, signal.SIGUSR1)), PATIENCE_S
        pids = [processes[rank].pid for rank in victims]
        if moment == "worker" and (worker := _child(pids[0])):
            pids, grace = [worker], PATIENCE_S
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        self.killed_at = time.time()
        _wait(lambda: not any(process.is_alive() for process in processes), grace)
        for process in processes:
            process.kill()
        codes = [rank.code for rank in ranked.finish(processes, self.folder)]
        if moment == "signal" and codes == [75] * RANKS:
            detail = signal.Signals(number).name
        steps = self._steps()
        kill = Kill(moment, detail, victims, aimed, codes, self.began, steps)
        if moment == "signal" and detail and self.last not in self.run.whole():
            kill.wrong.append(f"resume: stopped at step {self.last} without having saved it")
        return kill

    def _errors(self) -> str:
        return "\n".join(file.read_text()[-2000:] for file in sorted(self.folder.glob("*.err")))

    def _steps(self) -> int:
        """Steps that this start has logged."""
        mine = [line for line in read_metrics(self.metrics) if line["time"] >= self.begun]
        starts = [line["step"] for line in mine if line.get("event") == "start"]
        steps = _steps(mine)
        if starts:
            self.began = starts[0]
        if steps:
            self.first_step_at, self.last = steps[0]["time"], steps[-1]["step"]
        return len(steps)


def victim(arguments: list[str], run: str, folder: str, doom: tuple[str, int, int] | None) -> None:
    """A rank that notes the write boundaries that it comes to, and dies at the one that it is told."""
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
    """What the starts noted that lie in `folder`: write boundary -> ranks that came to it."""
    met: dict[str, list[int]] = {}
    for file in folder.rglob("boundaries-?"):
        for label in file.read_text().splitlines():
            met[label] = sorted({*met.get(label, []), int(file.name[-1])})
    return met


def differences(run: Path, undisturbed: Path, damaged: Collection[int] = ()) -> list[str]:
    """What a finished run has otherwise than the undisturbed one: lines of steps, checkpoints but `damaged` ones."""
    found, wanted = (
        [tuple(line[key] for key in EXACT) for line in _steps(read_metrics(folder / "metrics.jsonl"))]
        for folder in (run, undisturbed)
    )
    wrong = [f"line: {a} instead of {b}" for a, b in zip(found, wanted, strict=False) if a != b]
    if len(found) != len(wanted):
        wrong.append(f"line: {len(found)} steps logged instead of {len(wanted)}")
    last = f"checkpoints/step-{len(wanted):08d}"
    if not (run / last).is_dir():
        wrong.append("resume: the last step was not saved")
    return wrong + [text for step, text in torn(run, undisturbed).items() if step not in damaged]


def torn(run: Path, undisturbed: Path) -> dict[int, str]:
    """Step -> how its checkpoint differs from the undisturbed run's, of those under their final names."""
    found = {}
    for here in sorted((run / "checkpoints").glob("step-*")):
        there = undisturbed / "checkpoints" / here.name
        names = {file.name for folder in (here, there) for file in folder.iterdir()}
        different = [name for name in sorted(names) if _content(here / name) != _content(there / name)]
        if different:
            found[int(here.name[5:])] = f"torn: {here.name} differs in {', '.join(different)}"
    return found


def _steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "event" not in line]


def _content(file: Path) -> Any:
    """What must be equal in two runs: times and the folder's name need not be."""
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


def _wait(true: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not true() and time.monotonic() < limit:
        time.sleep(0.005)


def _child(pid: int) -> int | None:
    """A child process of a rank: a worker of its loader."""
    try:
        tasks = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return None
    children = [int(child) for text in tasks for child in text.split()]
    return children[-1] if children else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="so many, and more until that run is done")
    parser.add_argument("--steps", type=int, default=30, help="of each run")
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"), help="of the campaign, which goes on in it")
    parser.add_argument("--report", type=Path, help="where to write what was found; default report.md in FOLDER")
    parser.add_argument("--hardware", default="this machine", help="named in the report")
    given = parser.parse_args()
    # As the tests have it: kernels interpreted, no network.
    for name, value in (("TRITON_INTERPRET", "1"), ("DS_ACCELERATOR", "cpu"), ("HF_HUB_OFFLINE", "1")):
        os.environ.setdefault(name, value)
    import campaign_report
    import runs
    import small_model
    import small_shards

    folder = given.folder.resolve()
    if not (folder / "shards").is_dir():
        small_shards.save(folder / "shards")
    settings = (*small_model.settings(folder / "backbone"), "global_batch=4", "ema.decay=0.9")
    arguments = runs.arguments(folder / "shards", folder, *settings)
    campaign = Campaign(folder, arguments, "tiny-mllm", given.steps, kills_a_run=30)
    campaign.until(given.kills)
    (given.report or folder / "report.md").write_text(campaign_report.page(campaign, given.hardware))
    if campaign.wrong():
        raise SystemExit("\n".join(campaign.wrong()))


if __name__ == "__main__":
    main()
