"""What the tests of layouts share: four processes, started once."""

from pathlib import Path

import pytest
from four_ranks import RANKS
from support import ROOT

from glm3kit.config.groups import ParallelConfig, RunConfig
from glm3kit.jobs.launch import plan_launch, start_job
from glm3kit.setup.rank_table import local_rank_table


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory) -> Path:
    """The folder of a job of four ranks that has done the tasks of four_ranks.py; each task left a folder in it."""
    config = RunConfig(name="job", output_dir=str(tmp_path_factory.mktemp("four_ranks")),
                       parallel=ParallelConfig(data_parallel=RANKS, device_target="CPU"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))  # a launch adds the package
        job = start_job(plan_launch(config, local_rank_table(RANKS)),
                        command=[str(Path(__file__).with_name("four_ranks.py")), str(config.job_dir)])
    return job.wait(timeout_s=900).folder
