"""The live cell: what a job is doing, drawn from its folder every two seconds, with Stop and Resume.

Nothing but the folder is read, and of that only what is new, so the cell can be drawn again at any time: after the page
was reloaded, after the kernel was restarted, from another notebook. The training does not notice.

    training_monitor("output/tiny")
"""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from glm3kit.config.load import load_config
from glm3kit.errors import Glm3KitError
from glm3kit.jobs.job import LIVE, Job, elsewhere
from glm3kit.jobs.launch import launch
from glm3kit.jobs.metrics import NewRecords
from glm3kit.jobs.process import is_running

REFRESH_S = 2
SPEED_STEPS = 20  # over which step times are averaged
SILENT_S = 120  # without a line in its log, a running rank is shown as silent
STATES = {"starting": "starting 启动中", "running": "running 运行中", "succeeded": "succeeded 已完成",
          "failed": "failed 失败", "stopped": "stopped 已停止"}
BAR_STYLES = {"succeeded": "success", "failed": "danger", "stopped": "warning"}

# JupyterLab's variables follow its light and dark themes; the values behind the commas are for other front ends
STYLE = f"<style>\n{Path(__file__).with_suffix('.css').read_text(encoding='utf-8')}</style>"


@dataclass(frozen=True)
class Rank:
    """One process of a job: what it is doing, and for how long its log has been silent (None: it has no log)."""

    name: str
    state: str  # "starting", "running", "silent", "finished", "ended", or "exit code 1", "signal 9"
    silent_s: float | None

    @property
    def bad(self) -> bool:
        return self.state == "silent" or self.state.startswith(("exit", "signal"))


@dataclass(frozen=True)
class Progress:
    """What the folder of a job tells at a moment; None is what is not known yet."""

    state: str
    reason: str | None
    ranks: list[Rank]
    nodes: int
    can_resume: bool  # whether a complete checkpoint is there
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    left_s: float | None = None


class ProgressReader:
    """Reads the progress of a job, each time only what was added since the last."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.records = NewRecords(job.folder / "metrics.jsonl")
        self.recent: deque[dict[str, Any]] = deque(maxlen=SPEED_STEPS)

    def read(self) -> Progress:
        """The job as it is now. Raises JobError if its folder holds none any more."""
        state = self.job.state()
        self.recent.extend(self.records.read())
        last = self.recent[-1] if self.recent else {}
        times_ms = [record.get("step_time_ms") or 0 for record in self.recent]
        total, left_s = last.get("total_steps"), None
        if state["state"] in LIVE and total and any(times_ms):
            left_s = (total - last["step"]) * statistics.mean(times_ms) / 1000
        ranks, nodes = _job_ranks(self.job.folder, state), state.get("plan", {}).get("nodes", 1)
        for node in range(1, nodes):  # the jobs of the other machines are inside of this one's folder
            other = Job(self.job.folder / f"node_{node}")
            if (other.folder / "job.json").exists():
                ranks += _job_ranks(other.folder, other.state())
        return Progress(
            state["state"], state["reason"], ranks, nodes,
            any(self.job.folder.glob("checkpoint/step_*/complete.json")), last.get("step", 0), total, last.get("loss"),
            last.get("learning_rate"), last.get("tokens_per_second"), left_s)


def _job_ranks(folder: Path, state: dict[str, Any]) -> list[Rank]:
    processes, live, ranks = state["processes"], state["state"] in LIVE, []
    for name, code in state["exit_codes"].items():
        try:
            silent_s = time.time() - (folder / "log" / f"{name}.log").stat().st_mtime
        except FileNotFoundError:
            silent_s = None
        runs = name in processes and (live if elsewhere(state) else is_running(processes[name]))
        if code is not None:
            what = "finished" if code == 0 else f"exit code {code}" if code > 0 else f"signal {-code}"
        elif runs:
            what = "silent" if (silent_s or 0) > SILENT_S else "running"
        else:
            what = "starting" if live and name not in processes else "ended"
        ranks.append(Rank(name.replace("_", " "), what, silent_s if runs else None))
    return ranks


def duration(seconds: float) -> str:
    """Seconds as people read them: 45 s, 3 min 20 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def state_html(progress: Progress, note: str = "") -> str:
    """State and note, in a line; the reason of an end below it. Everything that was read is escaped."""
    state, name = escape(progress.state), escape(STATES.get(progress.state, progress.state))
    line = f'<span class="glm3kit-state glm3kit-{state}" role="status">{name}</span>'
    reason = f"<pre>{escape(progress.reason)}</pre>" if progress.reason else ""
    return f"{line}{escape(note)}{reason}"


def numbers_html(progress: Progress) -> str:
    """Step, time left, loss, learning rate and speed."""
    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    rows = {"step 步": f"{progress.step} / {progress.total_steps or '?'}",
            "time left 剩余时间": "–" if progress.left_s is None else duration(progress.left_s),
            "loss 损失": shown(progress.loss, ".4f"), "learning rate 学习率": shown(progress.learning_rate, ".3g"),
            "tokens/s 速度": shown(progress.tokens_per_second, ",.0f")}
    # no <dl>: JupyterLab's own rules let its parts float
    cells = (f'<div><span class="glm3kit-name">{name}</span><span class="glm3kit-value">{escape(value)}</span></div>'
             for name, value in rows.items())
    return f'<div class="glm3kit-numbers">{"".join(cells)}</div>'


def ranks_html(progress: Progress) -> str:
    """A mark for every rank: its state, and how long ago it last wrote to its log."""
    marks = []
    for rank in progress.ranks:
        ago = "" if rank.silent_s is None else f" · {duration(rank.silent_s)} ago"
        bad = ' class="glm3kit-bad"' if rank.bad else ""
        marks.append(f"<li{bad}>{escape(rank.name)}: {escape(rank.state)}{ago}</li>")
    return f'<ul aria-label="ranks">{"".join(marks)}</ul>'


class MonitorView:
    """The widgets that show one job, and what its buttons do. `box` is what a notebook displays."""

    def __init__(self, job: Job) -> None:
        self.job, self.reader = job, ProgressReader(job)
        self._note = ""
        self._busy = False  # stopping or resuming
        self._drawing = threading.Lock()  # the watching thread and those of the buttons draw
        self._watcher: threading.Thread | None = None

        self.state, self.numbers, self.ranks = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.bar = widgets.IntProgress(0, 0, 1)
        self.stop = self._button("stop", "Stop 停止", "End the job 停止作业", "stop", job.stop, "stopping 正在停止…")
        self.resume = self._button("resume", "Resume 继续", "Go on from the newest checkpoint 从最新检查点继续", "play",
                                   self._resume, "resuming 正在继续…")
        style = widgets.HTML(STYLE, layout=widgets.Layout(display="none"))
        buttons = widgets.HBox([self.stop, self.resume])
        self.box = widgets.VBox([style, self.state, self.bar, self.numbers, self.ranks, buttons])
        self.box.add_class("glm3kit-monitor")

    def _button(self, name: str, label: str, tooltip: str, icon: str, act: Callable[[], Any],
                note: str) -> widgets.Button:
        """A button that acts in a thread of its own: stopping takes seconds, and the kernel serves other cells."""
        button = widgets.Button(description=label, tooltip=tooltip, icon=icon).add_class(f"glm3kit-{name}")
        button.on_click(lambda _: threading.Thread(target=self._act, args=(act, note), daemon=True).start())
        return button

    def _act(self, act: Callable[[], Any], note: str) -> None:
        if self._busy:  # a second click
            return
        self._busy, self._note = True, note
        self.draw()
        try:
            act()
            self._note = ""
        except (Glm3KitError, OSError) as err:  # shown where it was asked for
            self._note = str(err)
        finally:
            self._busy = False
        self.watch()

    def _resume(self) -> None:
        folder = self.job.folder
        launch(load_config(folder / "config.yaml"), folder / "rank_table.json", wait=False, resume=True)

    def draw(self) -> bool:
        """Bring the widgets to what the folder tells; returns whether the job is still alive."""
        with self._drawing:
            try:
                progress = self.reader.read()
            except Glm3KitError as err:  # between two runs there is no job.json
                self.state.value = escape(self._note or str(err))
                return self._busy
            live = progress.state in LIVE
            self.state.value = state_html(progress, self._note)
            self.bar.max, self.bar.value = progress.total_steps or 1, progress.step
            self.bar.bar_style = BAR_STYLES.get(progress.state, "")
            self.numbers.value, self.ranks.value = numbers_html(progress), ranks_html(progress)
            self.stop.disabled = self._busy or not live
            # with several machines the command has to run on each
            self.resume.disabled = (self._busy or live or progress.state == "succeeded" or not progress.can_resume
                                    or progress.nodes > 1)
            return live or self._busy

    def watch(self) -> None:
        """Draw now, and every two seconds while the job is alive, in a thread of its own."""
        def watching() -> None:
            while self.draw():
                time.sleep(REFRESH_S)

        if self.draw() and not (self._watcher and self._watcher.is_alive()):
            self._watcher = threading.Thread(target=watching, daemon=True)
            self._watcher.start()


_views: dict[Path, MonitorView] = {}  # a cell that is run again shows the same widgets


def training_monitor(job: Job | str | Path) -> widgets.VBox:
    """Return the live cell of a job, or of its folder: state, progress, loss, speed, ranks, Stop and Resume.

    Raises JobError if no job was launched into the folder.
    Example: training_monitor(launch(config, wait=False))
    """
    job = job if isinstance(job, Job) else Job.attach(job)
    job.state()
    if job.folder not in _views:
        _views[job.folder] = MonitorView(job)
    _views[job.folder].watch()
    return _views[job.folder].box
