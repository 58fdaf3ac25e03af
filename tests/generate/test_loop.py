"""Generation: the reference's tokens and probabilities, the same in batches, streams, threads and graph mode."""

import json
import subprocess
import sys
import threading

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from mindspore.common.api import ms_compile_cache
from support import FLOAT32, golden_net

from glm3kit.config.groups import ModelConfig
from glm3kit.errors import ConfigError, Glm3KitError, PromptError
from glm3kit.model.chatglm3 import ChatGLM3

SAMPLED = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12, "eos_token_id": []}


@pytest.fixture(scope="module")
def prompts(reference) -> list[list[int]]:
    """Three prompts of 5, 9 and 17 tokens."""
    return [reference[f"greedy.prompt_{i}"].tolist() for i in range(3)]


@pytest.fixture(scope="module")
def expected(reference) -> list[list[int]]:
    """The prompts with the 32 tokens that the official code puts after them, no stop id among them."""
    return [reference[f"greedy.tokens_{i}"].tolist() for i in range(3)]


@pytest.fixture(scope="module")
def small_net() -> ChatGLM3:
    """All ids of ChatGLM3 but one small layer: it compiles fast."""
    net = ChatGLM3(ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=32, kv_channels=8, num_attention_heads=2,
                               multi_query_group_num=1, seq_length=96, **FLOAT32))
    replace_weights(net, seed=1)
    return net


def is_greedy(net: ChatGLM3, ids: list[int], prompt_length: int, penalty: float = 1.0) -> bool:
    """Whether each id after the prompt has the highest logit, computed at once, without cache and padding."""
    logits = net(Tensor([ids[:-1]], ms.int32)).asnumpy()[0]
    for i in range(prompt_length, len(ids)):
        seen = np.unique(ids[:i])
        row = logits[i - 1].copy()
        row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        if row.argmax() != ids[i]:
            return False
    return True


def replace_weights(net: ChatGLM3, seed: int) -> None:
    """Other random weights, by the function that MindSpore's load_param_into_net uses."""
    rng = np.random.default_rng(seed)
    for parameter in net.get_parameters():
        parameter.set_data(Tensor(rng.standard_normal(parameter.shape), ms.float32))


def test_greedy_tokens_equal_the_reference(net, prompts, expected):
    for prompt, ids in zip(prompts, expected, strict=True):
        (row,) = net.generate(prompt, max_new_tokens=32, eos_token_id=[])
        assert row.dtype == np.int32 and row.tolist() == ids


def test_rows_of_a_ragged_batch_equal_the_rows_alone(net, prompts, expected):
    assert [row.tolist() for row in net.generate(prompts, max_new_tokens=32, eos_token_id=[])] == expected


def test_rows_of_a_batch_end_one_by_one(net, prompts, expected):
    stops = [ids[len(prompt) + n] for prompt, ids, n in zip(prompts, expected, (9, 2, 5), strict=True)]
    ends = [next(i for i in range(len(prompt), len(ids)) if ids[i] in stops) + 1
            for prompt, ids in zip(prompts, expected, strict=True)]
    assert len(set(ends)) == 3 and min(ends) > 5
    rows = net.generate(prompts, max_new_tokens=32, eos_token_id=stops)
    assert [row.tolist() for row in rows] == [ids[:end] for ids, end in zip(expected, ends, strict=True)]


def test_every_form_of_a_prompt_gives_the_same(net, prompts, expected):
    prompt, answer = prompts[0], expected[0][:8]
    for form in (prompt, tuple(prompt), [prompt], np.array(prompt), np.array([prompt]), [np.array(prompt)],
                 Tensor(prompt, ms.int32), Tensor([prompt], ms.int64)):
        (row,) = net.generate(form, max_new_tokens=3, eos_token_id=[])
        assert row.tolist() == answer


def test_an_answer_ends_with_any_of_the_stop_ids(net, prompts, expected):
    prompt, ids = prompts[0], expected[0]
    for place in (5, 8, 11):
        end = ids.index(ids[place], len(prompt)) + 1
        for stop in (ids[place], (511, ids[place]), np.array([ids[place]])):
            (row,) = net.generate(prompt, eos_token_id=stop, max_new_tokens=32)
            assert row.tolist() == ids[:end]


@pytest.mark.parametrize("stop_id", [2, 64795, 64797])
def test_the_stop_ids_of_chatglm3_end_an_answer_by_default(small_net, stop_id):
    prompt = [64790, 64792, 64795, 30910]  # a stop id in the prompt ends nothing
    state = small_net.hidden(Tensor([prompt], ms.int32)).asnumpy()[0, -1]
    output = small_net.transformer.output_layer.weight
    before, weight = output.asnumpy().copy(), np.zeros((65024, 16), np.float32)
    weight[stop_id] = state  # so that this id has the highest logit
    ops.assign(output, Tensor(weight))  # as training does it: in place
    assert small_net.generate(prompt)[0].tolist() == [*prompt, stop_id]
    assert len(small_net.generate(prompt, eos_token_id=[], max_new_tokens=3)[0]) == 7
    ops.assign(output, Tensor(before))


def test_lengths_count_tokens_and_end_at_the_window(net, prompts, expected):
    prompt, window = prompts[1], net.cfg.seq_length
    forever = {"eos_token_id": []}
    assert net.generate(prompt, max_length=12, **forever)[0].tolist() == expected[1][:12]
    assert net.generate(prompt, max_new_tokens=4, **forever)[0].tolist() == expected[1][:13]
    assert len(net.generate(prompt, max_length=20, max_new_tokens=4, **forever)[0]) == 13
    assert len(net.generate(prompt, max_length=12, max_new_tokens=40, **forever)[0]) == 12
    (whole,) = net.generate(prompt, **forever)
    assert len(whole) == window and is_greedy(net, whole.tolist(), 9)
    assert len(net.generate(prompt, max_new_tokens=10 * window, **forever)[0]) == window


def test_a_row_that_fills_the_window_does_not_disturb_the_others(net, prompts, expected):
    (full,) = net.generate(prompts[2], eos_token_id=[], max_length=90)
    rows = net.generate([full, prompts[0], prompts[1]], eos_token_id=[], max_new_tokens=30)
    assert [len(row) for row in rows] == [96, 35, 39]
    assert rows[1].tolist() == expected[0][:35] and rows[2].tolist() == expected[1][:39]


def test_top_k_of_one_and_a_small_top_p_are_greedy(net, prompts, expected):
    for settings in ({"top_k": 1}, {"top_p": 1e-6}):
        rows = net.generate(prompts, do_sample=True, max_new_tokens=32, eos_token_id=[], **settings)
        assert [row.tolist() for row in rows] == expected


def test_a_seed_repeats_its_draws_and_another_draws_otherwise(net, prompts):
    first, again, other = (net.generate([prompts[0]] * 3, seed=seed, **SAMPLED) for seed in (1, 1, 2))
    assert [row.tolist() for row in first] == [row.tolist() for row in again]
    assert len({tuple(row) for row in [*first, *other]}) == 6  # rows of one prompt differ too
    assert net.generate(prompts[0], seed=1, **SAMPLED)[0].tolist() == first[0].tolist()
    assert len({tuple(net.generate(prompts[0], **SAMPLED)[0]) for _ in range(2)}) == 2


def test_greedy_generation_honours_the_repetition_penalty(net, prompts):
    plain, penalised = (net.generate(prompts[0], repetition_penalty=penalty, max_new_tokens=32, eos_token_id=[])[0]
                        for penalty in (1.0, 3.0))
    assert plain.tolist() != penalised.tolist()
    assert is_greedy(net, penalised.tolist(), 5, penalty=3.0)


def test_a_stream_gives_the_tokens_of_generate(net, prompts, expected):
    assert list(net.stream(prompts[0], max_new_tokens=32, eos_token_id=[])) == expected[0][5:]
    assert list(net.stream([prompts[0]], eos_token_id=expected[0][7])) == expected[0][5:8]
    sampled = net.generate(prompts[0], seed=5, **SAMPLED)[0][5:]
    assert list(net.stream(np.array(prompts[0]), seed=5, **SAMPLED)) == sampled.tolist()


def test_prompts_of_a_bucket_and_closed_streams_share_their_graphs(net, prompts, expected):
    net.generate(prompts[0], max_new_tokens=2, eos_token_id=[])
    compiled = set(ms_compile_cache)
    stream = net.stream(prompts[1], eos_token_id=[])
    assert [next(stream), next(stream)] == expected[1][9:11]
    stream.close()
    assert net.generate(prompts[2], max_new_tokens=32, eos_token_id=[])[0].tolist() == expected[2]
    net.generate([1] * 64, max_new_tokens=2, do_sample=True)
    assert ms_compile_cache == compiled
    net.generate([1] * 65, max_new_tokens=2)  # longer than the shortest bucket
    assert len(ms_compile_cache) <= len(compiled) + 1  # none where another test was first
    compiled = set(ms_compile_cache)
    net.generate([1] * 95, max_new_tokens=2)
    assert ms_compile_cache == compiled


def test_a_thread_other_than_the_main_one_may_stream(net, prompts, expected):
    found = []
    thread = threading.Thread(target=lambda: found.extend(net.stream(prompts[0], max_new_tokens=32, eos_token_id=[])))
    thread.start()
    thread.join()
    assert found == expected[0][5:]


def test_streams_that_take_turns_do_not_disturb_each_other(small_net):
    prompts, settings = ([1, 2, 3], [9, 8, 7]), {"max_new_tokens": 6, "eos_token_id": []}
    alone = [list(small_net.stream(prompt, **settings)) for prompt in prompts]
    streams = [small_net.stream(prompt, **settings) for prompt in prompts]
    assert list(zip(*streams, strict=True)) == list(zip(*alone, strict=True))
    found = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: list(small_net.stream(prompts[i], **settings))}))
               for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict(enumerate(alone))


def test_replaced_weights_are_the_ones_that_generate(small_net):
    settings = {"max_new_tokens": 6, "eos_token_id": []}
    (before,) = small_net.generate([1, 2, 3], **settings)
    replace_weights(small_net, seed=2)
    (after,) = small_net.generate([1, 2, 3], **settings)
    assert before.tolist() != after.tolist()
    assert is_greedy(small_net, after.tolist(), 3)


def test_weights_that_give_no_numbers_are_an_error_and_leave_no_trace(net, prompts, expected):
    bias = net.transformer.encoder.layers[0].self_attention.query_key_value.bias
    values = bias.asnumpy().copy()  # not a view of what is written over
    ops.assign(bias, Tensor(np.full_like(values, np.nan)))  # keys and values in the cache become nan
    try:
        for settings in ({}, {"do_sample": True}):
            with pytest.raises(Glm3KitError, match="after 95 tokens are no finite numbers; check"):
                net.generate([1] * 95, **settings)
    finally:
        ops.assign(bias, Tensor(values))
    assert net.generate(prompts[0], max_new_tokens=32, eos_token_id=[])[0].tolist() == expected[0]


def test_float16_on_a_cpu_takes_no_graph_and_says_the_same(prompts):
    """A graph would hold every weight in float32 too: 38 GB for ChatGLM3-6B."""
    net = golden_net(param_dtype="float16", compute_dtype="float16")
    compiled = set(ms_compile_cache)
    rows = net.generate(prompts, max_new_tokens=3, eos_token_id=[])
    assert ms_compile_cache == compiled
    assert [is_greedy(net, row.tolist(), len(prompt)) for row, prompt in zip(rows, prompts, strict=True)] == [True] * 3


def test_graph_mode_gives_the_same_tokens(golden, tmp_path):
    (tmp_path / "run.py").write_text(f"""\
import mindspore as ms
from glm3kit import ChatGLM3, ModelConfig, load_weights
ms.set_context(mode=ms.GRAPH_MODE)
net = ChatGLM3(ModelConfig.from_hf({str(golden / "hf/config.json")!r}, **{FLOAT32!r}))
load_weights(net, {str(golden / "hf")!r})
prompt = {np.load(golden / "reference.npz")["greedy.prompt_0"].tolist()}
print(net.generate(prompt, max_new_tokens=32, eos_token_id=[], num_beams=1)[0].tolist())
half = ChatGLM3(net.cfg.model_copy(update=dict(num_layers=1, param_dtype="float16", compute_dtype="float16")))
assert len(half.generate(prompt, max_new_tokens=2, eos_token_id=[])[0]) == len(prompt) + 2
assert ms.get_context("mode") == ms.GRAPH_MODE
""")
    run = subprocess.run([sys.executable, str(tmp_path / "run.py")], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout) == np.load(golden / "reference.npz")["greedy.tokens_0"].tolist()


def test_all_settings_out_of_range_are_reported_together(net):
    with pytest.raises(ConfigError, match="temperature is 0.*; top_p is 2.*"):
        net.stream([1], temperature=0, top_p=2)  # by the call itself, not by the first token


@pytest.mark.parametrize(("input_ids", "message"), [
    ([], "input_ids is empty; give at least one id"),
    ([[1, 2], []], "prompt 1 is empty"),
    (np.zeros((2, 0), np.int32), "prompt 0 is empty"),
    ([1, 512], "prompt 0 holds the id 512, the model's vocabulary ends at 511"),
    ([[1], [-1]], "prompt 1 holds the id -1"),
    ([1.0, 2.0], r"prompt 0 has shape \(2,\) and type float64, expected a row of integer ids"),
    (["a"], "expected a row of integer ids"),
    ("你好", "input_ids is '你好', expected a list of ids"),
    ({"input_ids": [[1]]}, "input_ids is {'input_ids': .*}, expected a list of ids"),
    ([1, [2, 3]], "prompt 0 is no row of integer ids"),
    ([[True]], "type bool, expected a row of integer ids"),
    (np.zeros((1, 2, 3), np.int32), r"prompt 0 has shape \(2, 3\)"),
    (7, "input_ids is 7, expected a list of ids"),
])
def test_prompts_that_are_none_are_errors(net, input_ids, message):
    for call in (net.generate, net.stream):
        with pytest.raises(PromptError, match=message):
            call(input_ids, max_new_tokens=1)


def test_a_prompt_without_room_for_an_answer_is_an_error_with_both_numbers(net):
    with pytest.raises(PromptError, match=r"prompt 0 has 96 tokens and the model's window \(seq_length\) is 96"):
        net.generate([1] * 96)
    with pytest.raises(PromptError, match="prompt 1 has 10 tokens and max_length is 8"):
        net.generate([[1] * 7, [1] * 10], max_length=8)
    with pytest.raises(PromptError, match=r"max_length is 97 tokens, the model's window \(seq_length\) is 96"):
        net.generate([1], max_length=97)


def test_a_stream_takes_one_prompt(net):
    with pytest.raises(PromptError, match="got 2 prompts, expected one"):
        net.stream([[1], [2]])
