"""Which slice of a parameter a rank holds under tensor parallelism (https://arxiv.org/abs/1909.08053).

    slicing("transformer.encoder.layers.0.mlp.dense_4h_to_h.weight", cfg).ranges(rank=1, ranks=2)
"""

from dataclasses import dataclass

import numpy as np

from glm3kit.config.groups import ModelConfig
from glm3kit.weights.names import fused_rows, parameter_shapes


@dataclass(frozen=True)
class Slicing:
    """How a parameter is cut for tensor parallelism: along `axis`, each of the `segments` (their lengths) on its own.

    Fused matrices have several segments: a slice of query_key_value holds some heads of each of q, k and v.
    unit: length of what is not cut, such as a head. A segment of fewer units than ranks is held several times.
    """

    axis: int
    segments: tuple[int, ...]
    unit: int = 1

    def ranges(self, rank: int, ranks: int) -> list[tuple[int, int]]:
        """Where the slice of one of `ranks` ranks lies in the whole: (first, end) in each segment."""
        result, start = [], 0
        for length in self.segments:
            units = length // self.unit
            assert units * self.unit == length and max(units, ranks) % min(units, ranks) == 0, "checked with the layout"
            held = max(units // ranks, 1)
            first = start + rank * units // ranks * self.unit
            result.append((first, first + held * self.unit))
            start += length
        return result

    def slice_of(self, values: np.ndarray, rank: int, ranks: int) -> np.ndarray:
        """The slice of one of `ranks` ranks."""
        held = [values[first:end] if self.axis == 0 else values[:, first:end]
                for first, end in self.ranges(rank, ranks)]
        return held[0] if len(held) == 1 else np.concatenate(held, self.axis)


def copies_of(cut: Slicing | None, ranks: int) -> tuple[int, int]:
    """(n, copies) of a slice: its first n indices no other rank holds, each of the others `copies` ranks hold alike."""
    if cut is None:
        return 0, ranks
    units = [length // cut.unit for length in cut.segments]
    alone = [end - first for (first, end), count in zip(cut.ranges(0, ranks), units, strict=True) if count >= ranks]
    return sum(alone), max(ranks // min(units), 1)


def slicing(name: str, cfg: ModelConfig) -> Slicing | None:
    """How tensor parallelism cuts a parameter, None for one that every rank holds whole.

    The matrices that enter attention and MLP are cut by their outputs (whole heads, whole gate/up columns), those that
    leave by their inputs, embedding and output layer by words. Where there are more ranks than key/value groups,
    several ranks hold the same group. An adapter's A is cut where W's inputs are, its B where W's outputs are.
    """
    head, ffn, rows = cfg.kv_channels, cfg.ffn_hidden_size, fused_rows(cfg)
    by_inputs = "self_attention.dense" in name or "dense_4h_to_h" in name
    if name.endswith(("lora_alpha", "lora_b" if by_inputs else "lora_a")):
        return None
    if "query_key_value" in name:
        return Slicing(0, rows, unit=head)
    if "dense_h_to_4h" in name:
        return Slicing(0, (ffn, ffn))
    if "self_attention.dense" in name:
        return Slicing(1, rows[:1], unit=head)
    if "dense_4h_to_h" in name:
        return Slicing(1, (ffn,))
    if "embedding_table" in name or "output_layer" in name:
        return Slicing(0, (cfg.padded_vocab_size,))
    return None


def slice_shapes(cfg: ModelConfig, ranks: int = 1) -> dict[str, tuple[int, ...]]:
    """The shape of what one of `ranks` tensor-parallel ranks holds of every parameter, in the order of the model."""
    shapes = parameter_shapes(cfg)
    for name, shape in shapes.items():
        if cut := slicing(name, cfg):
            held = sum(end - first for first, end in cut.ranges(0, ranks))
            shapes[name] = (*shape[:cut.axis], held, *shape[cut.axis + 1:])
    return shapes
