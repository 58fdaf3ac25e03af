"""ChatGLM3: layers of attention and MLP, embedding and output layer, loss.

Computes what the published `modeling_chatglm.py` computes; parameter names are MindFormers 1.1's. In the shapes:
B batch, T tokens, S slots of the kv cache, C hidden size, V vocabulary; the parts are in layers.py and attention.py.

    net = ChatGLM3(ModelConfig.from_hf("chatglm3-6b/config.json")); logits = net(ms.Tensor([[64790, 64792]], ms.int32))
"""

from collections.abc import Iterator
from itertools import chain
from math import sqrt
from typing import TYPE_CHECKING, Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from glm3kit.config.groups import ModelConfig
from glm3kit.data.token_file import IGNORE_INDEX
from glm3kit.errors import ConfigError
from glm3kit.model.attention import MASKED, SelfAttention, rotary_tables
from glm3kit.model.layers import MLP, Embedding, Linear, RMSNorm
from glm3kit.parallel import ALONE, GatherSlices, SumOfSlices, Topology, on_ascend

if TYPE_CHECKING:  # it imports this module
    from glm3kit.generate.loop import Conversation


class Layer(nn.Cell):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: ModelConfig, topology: Topology):
        super().__init__()
        dtype = getattr(ms, cfg.param_dtype)
        depth_scale = 1 / sqrt(2 * cfg.num_layers)  # keeps the sum of all layers' outputs at unit size (GPT-2)
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.layernorm_epsilon, dtype)
        self.self_attention = SelfAttention(cfg, topology, depth_scale)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.layernorm_epsilon, dtype)
        self.mlp = MLP(cfg, topology, depth_scale)

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: tuple | None = None,
                  slots: Tensor | None = None) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x), cos, sin, mask, cache, slots)
        return x + self.mlp(self.post_attention_layernorm(x))


class Encoder(nn.Cell):
    """All layers and the final norm."""

    def __init__(self, cfg: ModelConfig, topology: Topology):
        super().__init__()
        self.layers = nn.CellList([Layer(cfg, topology) for _ in range(cfg.num_layers)])
        self.final_layernorm = RMSNorm(cfg.hidden_size, cfg.layernorm_epsilon, getattr(ms, cfg.param_dtype))

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, caches: tuple | None = None,
                  slots: Tensor | None = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, None if caches is None else caches[i], slots)
        return self.final_layernorm(x)


class Transformer(nn.Cell):
    """Embedding, encoder and output layer: the parts that hold parameters."""

    def __init__(self, cfg: ModelConfig, topology: Topology):
        super().__init__()
        self.embedding = Embedding(cfg, topology)
        self.encoder = Encoder(cfg, topology)
        self.output_layer = Linear(cfg.hidden_size, cfg.padded_vocab_size // topology.tensor_parallel, cfg, topology, 0)


class CrossEntropySum(nn.Cell):
    """Sum of -log softmax(logits)[label] over the rows whose label counts.

    logits (N, V) float32, this rank's slice of the vocabulary; labels (N,) int32 of the whole
    -> (scalar, softmax over the slice (N, V), its share of the whole vocabulary's (N, 1)). The gradient is written out,
    softmax - one-hot; the softmax takes the place of the logits in memory.
    """

    def __init__(self, topology: Topology):
        super().__init__()
        self.rank, self.whole = topology.tensor_rank, topology.tensor_parallel == 1
        self.gather, self.sum = GatherSlices(topology), SumOfSlices(topology)
        self.softmax, self.highest = ops.Softmax(), ops.ArgMaxWithValue(1, keep_dims=True)
        # Operators as attributes: calls of mindspore.ops functions do not compile inside a bprop.
        self.clip, self.one_hot, self.pick = ops.ReLU(), ops.OneHot(), ops.GatherD()
        self.on, self.off = Tensor(1, ms.float32), Tensor(0, ms.float32)

    def local(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels as columns of this rank's slice, and 1.0 where they lie in it."""
        labels = labels - self.rank * logits.shape[1]
        ours = (labels >= 0).astype(ms.float32) * (labels < logits.shape[1]).astype(ms.float32)
        return (self.clip(labels).astype(ms.float32) * ours).astype(ms.int32), ours

    def construct(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probs = self.softmax(logits)
        place, highest = self.highest(logits)
        # log sum exp, from the softmax of the highest logit: that is at least 1 / V, so its logarithm is exact enough
        slice_total = highest - ops.log(self.pick(probs, 1, place))  # (N, 1)
        total = slice_total if self.whole else ops.logsumexp(self.gather(slice_total), 1, True)
        columns, ours = self.local(logits, labels)
        picked = self.sum(self.pick(logits, 1, columns.reshape(-1, 1)).reshape(-1) * ours)
        losses = (total.reshape(-1) - picked) * (labels != IGNORE_INDEX).astype(ms.float32)
        return losses.sum(), probs, ops.exp(slice_total - total)

    def bprop(self, logits: Tensor, labels: Tensor, out: tuple, dout: tuple) -> tuple[Tensor, Tensor]:
        counted = (labels != IGNORE_INDEX).astype(ms.float32) * dout[0]
        columns, ours = self.local(logits, labels)
        expected = self.one_hot(columns, logits.shape[1], self.on, self.off)
        if self.whole:
            return (out[1] - expected) * counted.reshape(-1, 1), labels
        return (out[1] * out[2] - expected * ours.reshape(-1, 1)) * counted.reshape(-1, 1), labels


class ChatGLM3(nn.Cell):
    """The language model: input_ids (B, T) int32 -> logits (B, T, V) float32.

    cfg: sizes and types. topology: this process's place where several share the model.
    Parameters start random (normal, 0.02); `load_weights` fills them.
    Raises ValueError if T exceeds cfg.seq_length, ConfigError for a computing type that the device has not.
    """

    def __init__(self, cfg: ModelConfig, topology: Topology = ALONE):
        super().__init__()
        if cfg.compute_dtype == "bfloat16" and not on_ascend():
            raise ConfigError("model.compute_dtype is bfloat16, in which MindSpore multiplies no matrices on a CPU; "
                              "set model.compute_dtype=float32 (weights may stay bfloat16)")
        self.cfg, self.topology = cfg, topology
        self.transformer = Transformer(cfg, topology)
        cos, sin = rotary_tables(cfg.seq_length, cfg.kv_channels)
        dtype = getattr(ms, cfg.compute_dtype)  # the reference keeps its tables in the model's type
        self.cos, self.sin = Tensor(cos, dtype), Tensor(sin, dtype)
        self.gather = GatherSlices(topology)
        self.cross_entropy = CrossEntropySum(topology)
        self.decoders: dict[int, list[nn.Cell]] = {}  # idle kv caches of `generate`, by batch size

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None,
               segment_ids: Tensor | None = None) -> Tensor:
        """Output of the final norm (B, T, C).

        attention_mask (B, T) int32 holds 0 where a row is padded on the left; segment_ids (B, T) int32 the number of
        the record that a token belongs to, where several stand in one row: each is computed as if it stood alone.
        """
        B, T = input_ids.shape
        if T > self.cfg.seq_length:
            raise ValueError(f"input_ids has {T} tokens a row, more than seq_length {self.cfg.seq_length}; "
                             "shorten the input or raise seq_length")
        steps = ops.arange(T)
        allowed = (steps.reshape(1, T) <= steps.reshape(T, 1)).reshape(1, 1, 1, T, T)
        if attention_mask is not None:
            allowed = ops.logical_and(allowed, (attention_mask != 0).reshape(B, 1, 1, 1, T))
        cos, sin = self.cos[:T].reshape(1, T, 1, -1), self.sin[:T].reshape(1, T, 1, -1)
        if segment_ids is not None:
            same = segment_ids.reshape(B, 1, 1, 1, T) == segment_ids.reshape(B, 1, 1, T, 1)
            allowed = ops.logical_and(allowed, same)
            places = allowed.astype(ms.float32).sum(-1).reshape(B * T).astype(ms.int32) - 1  # each record from 0
            cos, sin = self.cos[places].reshape(B, T, 1, -1), self.sin[places].reshape(B, T, 1, -1)
        mask = (1 - allowed.astype(ms.float32)) * MASKED
        return self.transformer.encoder(self.transformer.embedding(input_ids), cos, sin, mask)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (N, C) -> this rank's slice of the logits (N, V / ranks) in float32."""
        return self.transformer.output_layer(x).astype(ms.float32)

    def construct(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.hidden(input_ids, attention_mask)
        B, T, C = x.shape
        return self.gather(self.logits(x.reshape(B * T, C))).reshape(B, T, -1)

    def loss_sum(self, input_ids: Tensor, labels: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """Summed loss over the labels that count; labels are shifted: labels[i] is the token after input_ids[i]."""
        x = self.hidden(input_ids, None, segment_ids)
        return self.cross_entropy(self.logits(x.reshape(-1, x.shape[-1])), labels.reshape(-1))[0]

    def loss(self, input_ids: Tensor, labels: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """Mean loss over the labels that count, a scalar; labels (B, T) int32 are shifted, -100 is ignored.

        segment_ids: see `hidden`.
        """
        counted = (labels != IGNORE_INDEX).astype(ms.float32).sum()
        return self.loss_sum(input_ids, labels, segment_ids) / ops.maximum(counted, 1.0)

    def forget_prompts(self) -> None:
        """Let conversations compute their next prompt whole: call it when weights have been changed in place."""
        for decoder in chain.from_iterable(self.decoders.values()):
            decoder.held = []

    def generate(self, input_ids: Any, **settings: Any) -> list[np.ndarray]:
        """Prompts and their answers, a row each; see `glm3kit.generate.loop.generate`."""
        from glm3kit.generate.loop import generate  # it imports this module
        return generate(self, input_ids, **settings)

    def stream(self, input_ids: Any, **settings: Any) -> Iterator[int]:
        """The ids of one answer as they are made; see `glm3kit.generate.loop.stream`."""
        from glm3kit.generate.loop import stream
        return stream(self, input_ids, **settings)

    def conversation(self, **settings: Any) -> "Conversation":
        """Streams the answers of a conversation, computing what is new; see `glm3kit.generate.loop.Conversation`."""
        from glm3kit.generate.loop import Conversation
        return Conversation(self, **settings)
