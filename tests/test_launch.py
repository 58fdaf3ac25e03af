"""Launching: which devices a run gets, what its ranks inherit, what is refused before anything starts."""

import os

import pytest

from glm3kit.cluster import msrun_command, plan_run
from glm3kit.config import RunConfig, load_config
from glm3kit.errors import JobError, RankTableError
from glm3kit.launch import choose_rank_table, launch, rank_environment, visible_devices
from glm3kit.rank_table import Device, RankTable, Server, local_rank_table, merge_rank_tables


def make_config(folder, ranks=1, **more):
    parallel = {"data_parallel": ranks, "device_target": "CPU"} | more
    return RunConfig(name="job", output_dir=str(folder), parallel=parallel)


def two_servers():
    return merge_rank_tables([local_rank_table(1, "10.0.0.1"),
                              RankTable((Server("10.0.0.2", (Device("0", "10.0.0.3", "0"),)),))])


def test_too_few_devices_are_refused_with_both_numbers_and_nothing_is_written(tmp_path):
    with pytest.raises(RankTableError, match=r"lists 1 device\(s\), but 2 are asked for"):
        launch(make_config(tmp_path / "output", 2), rank_table=local_rank_table(1))
    assert not (tmp_path / "output").exists()


def test_a_table_still_initializing_starts_nothing(tmp_path):
    (tmp_path / "hccl.json").write_text('{"status": "initializing"}')
    with pytest.raises(RankTableError, match="initializing"):
        launch(make_config(tmp_path / "output", 2), rank_table=tmp_path / "hccl.json", table_timeout_s=0)
    assert not (tmp_path / "output").exists()


def test_the_platforms_table_is_used_unless_the_run_is_for_the_cpu(tmp_path):
    (tmp_path / "user/config").mkdir(parents=True)
    RankTable((Server("10.0.0.1", tuple(Device(str(n), f"10.1.0.{n}", str(n)) for n in range(8))),)).save(
        tmp_path / "user/config/jobstart_hccl.json")
    found = choose_rank_table(make_config(tmp_path, 2, device_target="auto"), environ={}, root=tmp_path)
    assert [device.device_ip for device in found.devices] == ["10.1.0.0", "10.1.0.1"]
    assert choose_rank_table(make_config(tmp_path, 2), environ={}, root=tmp_path) == local_rank_table(2)
    with pytest.raises(RankTableError, match="lists 8"):
        choose_rank_table(make_config(tmp_path, 9, device_target="auto"), environ={}, root=tmp_path)


def test_without_a_table_the_cards_of_the_machine_are_counted(tmp_path):
    (tmp_path / "dev").mkdir()
    ascend = make_config(tmp_path, 2, device_target="Ascend")
    with pytest.raises(RankTableError, match=r"shows 0 Ascend card\(s\) .* but 2 are asked for"):
        choose_rank_table(ascend, environ={}, root=tmp_path)
    either = make_config(tmp_path, 2, device_target="auto")
    assert choose_rank_table(either, environ={}, root=tmp_path) == local_rank_table(2)
    (tmp_path / "dev/davinci0").touch()
    with pytest.raises(RankTableError, match=r"shows 1 Ascend card"):
        choose_rank_table(either, environ={}, root=tmp_path)


def table_of(*device_ids):
    return RankTable((Server("a", tuple(Device(str(d), "", str(n)) for n, d in enumerate(device_ids))),))


def test_other_cards_than_the_first_are_made_visible_by_their_place():
    assert visible_devices(("0", "1"), [0, 1, 2, 3]) is None
    assert visible_devices(("4", "5"), list(range(8))) == "4,5"
    assert visible_devices(("4", "5"), [4, 5]) is None  # a container that was given these two
    assert visible_devices(("6", "4"), [4, 5, 6]) == "2,0"
    assert visible_devices(("9",), [0]) is None  # numbers of another host: leave it to the runtime


def test_ranks_share_the_cores_and_forget_other_launchers(tmp_path):
    caller = {"RANK_TABLE_FILE": "x", "MS_ROLE": "MS_WORKER", "RANK_ID": "3", "HOME": "/root"}
    environment = rank_environment(plan_run(local_rank_table(2)), "CPU", caller)
    assert not environment.keys() & {"RANK_TABLE_FILE", "MS_ROLE", "RANK_ID"}
    assert environment["HOME"] == "/root"
    assert environment["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert rank_environment(plan_run(local_rank_table(2)), "CPU", {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
    (tmp_path / "dev").mkdir()
    for card in range(4):
        (tmp_path / f"dev/davinci{card}").touch()
    on_cards = rank_environment(plan_run(table_of(2, 3)), "Ascend", {}, tmp_path)
    assert on_cards["ASCEND_RT_VISIBLE_DEVICES"] == "2,3" and "OMP_NUM_THREADS" not in on_cards


def test_msrun_is_asked_for_one_process_a_device_on_this_machine(tmp_path):
    command = msrun_command(plan_run(local_rank_table(8), port=4567), tmp_path,
                            ["-m", "glm3kit", "train", "config.yaml"])
    assert not [word for word in command if word.startswith("--node_rank")]
    assert {"--worker_num=8", "--local_worker_num=8", "--master_port=4567", f"--log_dir={tmp_path}"} <= set(command)
    assert command[-5:] == ["python", "-m", "glm3kit", "train", "config.yaml"]


def test_the_saved_configuration_means_the_same_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = RunConfig(output_dir="output", data={"train_path": "train.json"}, model={"tokenizer_path": "tok.model"})
    config.save("deep/er/config.yaml")
    loaded = load_config("deep/er/config.yaml")
    assert loaded.job_dir == tmp_path / "output/run"
    assert loaded.data.train_path == (str(tmp_path / "train.json"),)
    assert loaded.model.tokenizer_path == str(tmp_path / "tok.model")


def test_a_configuration_without_data_is_read_back_equal(tmp_path):
    RunConfig(output_dir="/output").save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == RunConfig(output_dir="/output")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match="cannot be written"):
        launch(make_config(tmp_path / "file"))
