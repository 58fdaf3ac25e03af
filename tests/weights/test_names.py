"""Names and shapes of the parameters, in each of the forms."""

import numpy as np

from glm3kit.config.groups import ModelConfig
from glm3kit.weights.names import glm_names, hf_name, parameter_shapes, part_of

EMBEDDING = "transformer.embedding.embedding_table"
OUTPUT = "transformer.output_layer.weight"


def test_the_6b_model_has_199_parameters_of_the_published_shapes():
    shapes = parameter_shapes(ModelConfig())
    assert len(shapes) == 28 * 7 + 3
    assert shapes[EMBEDDING] == shapes[OUTPUT] == (65024, 4096)
    layer = "transformer.encoder.layers.27."
    assert shapes[layer + "self_attention.query_key_value.weight"] == (4608, 4096)
    assert shapes[layer + "self_attention.query_key_value.bias"] == (4608,)
    assert shapes[layer + "self_attention.dense.weight"] == (4096, 4096)
    assert shapes[layer + "mlp.dense_h_to_4h.weight"] == (27392, 4096)
    assert shapes[layer + "mlp.dense_4h_to_h.weight"] == (4096, 13696)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 6243584000  # the published parameter count


def test_names_map_to_mindspore_and_back(published):
    for name in published:
        assert hf_name(part_of(name).name) == name
    assert part_of("transformer.embedding.word_embeddings.weight").name == EMBEDDING
    assert part_of("transformer.embedding.embedding_weight").name == EMBEDDING
    assert part_of(OUTPUT).name == OUTPUT


def test_the_shapes_of_a_config_are_those_of_its_weights(hub, published):
    shapes = parameter_shapes(ModelConfig.from_hf(hub / "config.json"))
    assert {hf_name(name): shape for name, shape in shapes.items()} == {
        name: array.shape for name, array in published.items() if "inv_freq" not in name}


def test_names_of_every_form_lead_back_to_one():
    for name in parameter_shapes(ModelConfig()):
        parts = glm_names(name)
        assert [part_of(part) for part in parts] == [(name, index, len(parts)) for index in range(len(parts))]
        assert part_of(hf_name(name)) == part_of(name) == (name, 0, 1)
