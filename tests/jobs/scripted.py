"""Jobs whose ranks are scripts without a model, and what the tests ask of them when they have ended."""

import json

import pytest
from support import until

from glm3kit.config.groups import RunConfig
from glm3kit.errors import JobError
from glm3kit.jobs.process import is_running, job_processes

# `behaviour` is what rank `who` does, the others sleep (or end, for "succeed").
RANK = '''
import os, signal, sys, time
from glm3kit.jobs.process import rank_process

folder, behaviour, who = sys.argv[1:]
me = "scheduler" if os.environ.get("MS_ROLE") == "MS_SCHED" else os.environ["RANK_ID"]
if behaviour == "exit early" and me == who:
    sys.exit(7)
with rank_process(folder):
    print("rank", me, "of", os.environ["RANK_SIZE"])
    if behaviour == "train":
        with open(folder + "/metrics.jsonl", "w") as metrics:
            for step in (1, 2):
                metrics.write('{"step": %d, "loss": 2.5}\\n' % step)
    elif behaviour != "succeed" and (behaviour == "sleep" or me != who):
        time.sleep(300)
    time.sleep(0.3)
    if behaviour == "raise":
        raise ValueError("boom")
    if behaviour == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "exit silently":
        os._exit(0)
'''


def make_config(folder, ranks=1, **parallel):
    return RunConfig(name="job", output_dir=str(folder),
                     parallel={"data_parallel": ranks, "device_target": "CPU"} | parallel)


def nothing_runs(job):
    supervisor = json.loads((job.folder / "job.json").read_text())["processes"]["supervisor"]
    until(lambda: not is_running(supervisor), 5)
    return not job_processes(job.folder)


def reason_of(job):
    with pytest.raises(JobError) as caught:
        job.wait(60)
    assert job.state()["state"] == "failed"
    return str(caught.value)
