"""Advice for failures: real messages lead to the right one."""

import pytest

from glm3kit.jobs.diagnosis import MOST, SYMPTOMS, diagnose

# Messages as MindSpore 2.10 on a CPU, the system, CANN's documentation and the seed's questions have them.
MESSAGES = [
    ("OSError: [Errno 28] No space left on device", "The disk is full"),
    ("RuntimeError: Memory not enough: current free memory size[0] is smaller than required size[4096]",
     "Memory ran out"),
    ("[ERROR] EL0004: [PID: 7] 2025-01-01 Failed to allocate memory.", "Memory ran out"),
    ("rank 1 of 8 was killed by signal 9 (SIGKILL; the system does that when memory runs out)", "look at `dmesg`"),
    ("A module that was compiled using NumPy 1.x cannot be run in NumPy 2.0.2", "pip install 'numpy<2'"),
    ("ModuleNotFoundError: No module named 'sentencepiece'", "`glm3kit check` lists"),
    ("ImportError: libascend_hal.so: cannot open shared object file", "set_env.sh"),
    ("ModuleNotFoundError: No module named 'te.platform'", "set_env.sh"),
    ("EJ0001: Failed to initialize the HCCP process. Reason: Maybe the last training process is running.",
     "held by an earlier process"),
    ("[InitGroupStage][RanktableCheck]errNo[0x0000000005010001] super_device_id[] is invalid", "`glm3kit rank-table"),
    ("ValueError: the strategy is ((8, 1)), shape 193 cannot be divisible by value 8", "must be the seq_length"),
    ("step 7: loss nan, gradient norm nan; expected finite numbers.", "INFNAN_MODE"),
    ("overflow cond: True, loss_scale: 2.0\nstep 2: overflow cond: True", "INFNAN_MODE"),
    ("zmq.error.ZMQError: Address already in use", "give another with --port"),
    ("RuntimeError: Failed to initialize collective communication because some processes in the cluster are not "
     "successfully spawned. You can run command", "Not every rank came"),
    ("RuntimeError: The total number of timed out node is 1. Timed out node list is: [const vector]{2}, worker 2 is "
     "the first one timed out, please check its log.", "connection between ranks broke"),
    ("RuntimeError: Launch kernel failed, name:Default/AllReduce-op0", "connection between ranks broke"),
    ("Launch kernel failed: Default/gradients-Gradients/reduce-ReduceScatter/AllReduce-op9",
     "connection between ranks broke"),
    ("RuntimeError: Sync stream Failed", "ASCEND_GLOBAL_LOG_LEVEL"),
]


@pytest.mark.parametrize("message, advice", MESSAGES)
def test_a_real_message_leads_to_its_advice(message, advice):
    assert any(advice in line for line in diagnose(message)), diagnose(message)


def test_every_advice_is_reached_by_a_message():
    assert {line for message, _ in MESSAGES for line in diagnose(message)} == {advice for _, advice in SYMPTOMS}


@pytest.mark.parametrize("text", ["", "ValueError: boom", "step:[    1/  190], loss: 7.651, overflow cond: False",
                                  "overflow cond: True, loss_scale: 65536.0"])
def test_a_log_without_a_known_symptom_gets_no_advice(text):
    assert diagnose(text) == []


def test_the_cause_is_told_before_what_follows_from_it_and_not_everything():
    text = "AllReduce\nLaunch kernel failed, name:Default/AllReduce-op0\nSync stream Failed\nNo space left on device"
    advice = diagnose(text)
    assert advice[0].startswith("The disk is full") and len(advice) == MOST
