"""The configurations that come with the kit: they load, and hold the published values."""

from pathlib import Path

import pytest
from support import ROOT

from glm3kit.config.load import load_config

CONFIGS = ROOT / "configs"
# MindFormers 1.1, configs/glm3/: window, type, source, target, batch, epochs, learning rate, save every, keep
PUBLISHED = {
    "run_glm3_6b": (193, "bfloat16", 64, 128, 8, 1, 5e-5, 1000, 2),
    "run_glm3_6b_finetune_800T_A2_64G": (192, "float16", 64, 127, 4, 1, 1e-4, 1000, 1),
    "run_glm3_6b_finetune_2k_800T_A2_64G": (2048, "bfloat16", 1024, 1023, 4, 1, 1e-4, 1000, 1),
    "run_glm3_6b_multiturn_finetune_800T_A2_64G": (2048, "float16", None, None, 8, 2, 1e-4, 100, 1),
}
CHATGLM3_6B = {"num_layers": 28, "padded_vocab_size": 65024, "hidden_size": 4096, "ffn_hidden_size": 13696,
               "kv_channels": 128, "num_attention_heads": 32, "multi_query_group_num": 2, "layernorm_epsilon": 1e-5}


@pytest.mark.parametrize("name", [*PUBLISHED, "predict_glm3_6b"])
def test_the_model_is_chatglm3_6b(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    assert {key: getattr(config.model, key) for key in CHATGLM3_6B} == CHATGLM3_6B
    assert config.name == name


@pytest.mark.parametrize("name", PUBLISHED)
def test_training_has_the_published_values(name):
    seq_length, dtype, source, target, batch_size, epochs, learning_rate, save_steps, keep = PUBLISHED[name]
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.model.seq_length == config.data.seq_length == seq_length
    assert (config.model.param_dtype, config.model.compute_dtype) == (dtype, dtype)
    if source:
        assert (config.data.max_source_length, config.data.max_target_length) == (source, target)
    train = config.train
    assert (train.batch_size, train.epochs, train.save_steps, train.keep_checkpoints) == (
        batch_size, epochs, save_steps, keep)
    assert (train.learning_rate, train.end_learning_rate, train.warmup_steps) == (learning_rate, 1e-6, 0)
    assert (train.eps, train.loss_scale, train.recompute) == (1e-8, "dynamic", True)
    assert config.parallel.data_parallel == 8


def test_adgen_is_trained_with_decay_and_clipping_and_conversations_without():
    adgen = load_config(CONFIGS / "run_glm3_6b_finetune_800T_A2_64G.yaml").train
    assert (adgen.betas, adgen.weight_decay, adgen.max_grad_norm) == ((0.9, 0.95), 0.1, 1.0)
    conversations = load_config(CONFIGS / "run_glm3_6b_multiturn_finetune_800T_A2_64G.yaml").train
    assert (conversations.betas, conversations.weight_decay, conversations.max_grad_norm) == ((0.9, 0.999), 0.0, None)


def test_prediction_has_the_published_values():
    config = load_config(CONFIGS / "predict_glm3_6b.yaml")
    assert (config.model.seq_length, config.model.compute_dtype) == (2048, "float16")
    generate = config.generate
    assert (generate.top_k, generate.top_p, generate.repetition_penalty, generate.do_sample) == (1, 1.0, 1.0, False)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_paths_stand_beside_the_configurations(path):
    config = load_config(path)
    repository = CONFIGS.parent
    paths = [config.output_dir, config.model.tokenizer_path, config.model.checkpoint_name_or_path,
             *config.data.train_path, *config.data.eval_path]
    assert all(Path(path).is_relative_to(repository) for path in paths if path)


def test_lora_has_the_published_values_of_glm2():
    config = load_config(CONFIGS / "run_glm3_6b_lora_800T_A2_64G.yaml")
    lora = config.train.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (8, 32, 0.1, ("query_key_value",))
    assert config.model == load_config(CONFIGS / "run_glm3_6b_finetune_800T_A2_64G.yaml").model
