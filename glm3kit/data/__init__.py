"""Rows to tokens to batches."""

from glm3kit.data.batches import Batches
from glm3kit.data.encode import encode_adgen, encode_conversation, prepare_data

__all__ = ["Batches", "encode_adgen", "encode_conversation", "prepare_data"]
