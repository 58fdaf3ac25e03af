"""The live cell as a person meets it: JupyterLab in chromium, and a job whose rank only writes its metrics.

Screenshots stay in pytest's temporary folder; their paths are printed (`pytest -s`).
"""

import re

import nbformat
import pytest
from playwright.sync_api import expect

from glm3kit.jobs.job import Job
from glm3kit.jobs.process import job_processes

pytestmark = pytest.mark.browser

RANK = """
import json, pathlib, sys, time
from glm3kit.jobs.process import rank_process

folder = pathlib.Path(sys.argv[1])
with rank_process(folder), open(folder / "metrics.jsonl", "w") as metrics:
    (folder / "checkpoint/step_2").mkdir(parents=True)
    (folder / "checkpoint/step_2/complete.json").touch()
    for step in range(1, 1001):
        time.sleep(0.3)
        print("step", step)
        record = {"step": step, "total_steps": 1000, "loss": 7 / step ** 0.5, "learning_rate": 1e-4,
                  "tokens_per_second": 1520.0, "step_time_ms": 300}
        metrics.write(json.dumps(record) + "\\n")
        metrics.flush()
"""
START = """
from glm3kit.config.groups import RunConfig
from glm3kit.jobs.launch import plan_launch, start_job
from glm3kit.setup.rank_table import local_rank_table

config = RunConfig(name="job", output_dir={folder!r}, parallel={{"device_target": "CPU"}})
job = start_job(plan_launch(config, local_rank_table(1)), command=[{script!r}, str(config.job_dir)])
"""
SHOW = """
from glm3kit.notebook.monitor import training_monitor
training_monitor({job!r})
"""


def test_a_job_is_watched_found_again_after_a_reload_and_stopped(lab, page, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    start = START.format(folder=str(tmp_path), script=str(tmp_path / "rank.py"))
    cells = [nbformat.v4.new_code_cell(code.strip()) for code in (start, SHOW.format(job=str(tmp_path / "job")))]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}  # without it JupyterLab asks
    path = lab.folder / "monitor.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)

    def picture(name):
        box.screenshot(path=tmp_path / f"{name}.png")
        print(f"screenshot: {tmp_path / name}.png")

    lab.open(page, path)
    lab.run_all(page)
    box = page.locator(".glm3kit-monitor")
    state, stop, resume = (box.get_by_role(role, name=name) for role, name in (
        ("status", None), ("button", "Stop"), ("button", "Resume")))
    try:
        expect(state).to_have_text("running 运行中")
        step = box.locator(".glm3kit-value").first
        expect(step).to_have_text(re.compile(r"[1-9]\d* / 1000"))
        seen = step.inner_text()
        expect(step).not_to_have_text(seen)  # it moves by itself
        expect(box.get_by_role("list", name="ranks")).to_contain_text("rank 0: running")
        expect(box).to_contain_text(re.compile(r"time left 剩余时间\s*[45] min \d\d s"))
        expect(stop).to_be_enabled()
        expect(resume).to_be_disabled()
        picture("1-running")

        # the page is reloaded: the cell, run again, draws the job from its folder
        lab.open(page, path)
        lab.run_cell(page, 1)
        expect(state).to_have_text("running 运行中")
        expect(step).to_have_text(re.compile(r"[1-9]\d* / 1000"))

        stop.click()
        expect(state).to_have_text("stopped 已停止")
        expect(stop).to_be_disabled()
        expect(resume).to_be_enabled()  # there is a checkpoint to go on from
        job = Job.attach(tmp_path / "job")
        assert job.state()["state"] == "stopped" and not job_processes(job.folder)
        picture("2-stopped")
        lab.theme(page, "JupyterLab Dark")
        picture("3-dark")
    finally:
        lab.theme(page, "JupyterLab Light")
        Job.attach(tmp_path / "job").stop()
