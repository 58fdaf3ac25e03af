"""Scripted jobs, ended whatever a failing test leaves."""

import pytest
from jobs.scripted import RANK, make_config

from glm3kit.jobs.launch import plan_launch, start_job
from glm3kit.setup.rank_table import local_rank_table


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a job of scripted ranks in the folder job/."""
    monkeypatch.setattr("glm3kit.jobs.job.POLL_S", 0.05)
    jobs = []

    def start(behaviour, ranks=1, who="0", overwrite=False, script=RANK):
        (tmp_path / "rank.py").write_text(script)
        config = make_config(tmp_path, ranks)
        command = [str(tmp_path / "rank.py"), str(config.job_dir), behaviour, who]
        jobs.append(start_job(plan_launch(config, local_rank_table(ranks)), overwrite, command))
        return jobs[-1]

    yield start
    for job in jobs:
        job.stop()
