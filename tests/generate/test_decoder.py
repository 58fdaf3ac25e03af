"""What generation asks of a model is what the Protocol names, and no more."""

import mindspore as ms
from mindspore import Tensor, nn, ops
from support import FLOAT32

from glm3kit.config.groups import ModelConfig
from glm3kit.generate.loop import Conversation, generate, stream
from glm3kit.parallel import ALONE


class Counting(nn.Cell):
    """A model with what `LanguageModel` names and nothing else: after n comes n + 1."""

    def __init__(self):
        super().__init__()
        self.cfg = ModelConfig(num_layers=1, padded_vocab_size=16, kv_channels=4, seq_length=12, **FLOAT32)
        self.topology, self.kv_groups, self.decoders = ALONE, 1, {}

    def hidden_with_cache(self, input_ids: Tensor, positions: Tensor, unseen: Tensor, caches: tuple,
                          slots: Tensor) -> Tensor:
        return input_ids.astype(ms.float32).expand_dims(-1)  # (B, T, 1)

    def logits(self, x: Tensor) -> Tensor:
        return -ops.abs(ops.arange(16).astype(ms.float32) - x - 1)  # (N, 16)


def test_any_model_with_the_methods_of_the_protocol_generates():
    net, settings = Counting(), {"max_new_tokens": 3, "eos_token_id": []}
    assert [row.tolist() for row in generate(net, [[7, 3], [1]], **settings)] == [[7, 3, 4, 5, 6], [1, 2, 3, 4]]
    assert generate(net, [3], num_beams=2, **settings)[0].tolist() == [3, 4, 5, 6]
    assert list(stream(net, [8], max_new_tokens=9, eos_token_id=11)) == [9, 10, 11]
    talk = Conversation(net, **settings)
    assert [list(talk([1])), list(talk([1, 2, 3, 4, 9]))] == [[2, 3, 4], [10, 11, 12]]
