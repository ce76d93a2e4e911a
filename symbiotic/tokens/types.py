"""The type of a token: made once, by the dataset, and read by every consumer.

Router, gradient shield, loss, attention mask and metrics all read the same int8 tensor of these values;
nobody guesses a type from a token id. The values are written into shards and never change.
"""

from enum import IntEnum

import numpy as np

from symbiotic.errors import DataError

NUM_TOKEN_TYPES = 16
"""Length of a table indexed by token type: the low four bits of a segment's mode byte."""

TYPE_MASK = 0x0F
"""Bits 0 to 3 of a segment's mode byte: its token type."""

NO_LOSS_BIT = 0x10
"""Bit 4 of a segment's mode byte: no label inside the segment is trained on."""


class TokenType(IntEnum):
    """What a token is as an *input*. Values 6 to 14 are reserved."""

    TEXT = 0
    UNDERSTANDING_CODE = 1
    GENERATION_CODE = 2
    UNDERSTANDING_FEATURE = 3
    GENERATION_LATENT = 4
    CONDITION_LATENT = 5
    PADDING = 15
    """Exists only in batches, never in a shard."""


class LossClass(IntEnum):
    """What a *label* counts as in the loss and in every loss curve.

    Every label after a begin-generation-image token up to and with the closing token is GENERATION;
    labels inside an image to understand are UNDERSTANDING; everything else is TEXT.
    """

    TEXT = 0
    UNDERSTANDING = 1
    GENERATION = 2


def type_by_name(name: str) -> TokenType:
    """The TokenType of a lower-case name such as ``generation_code``.

    Raises:
        KeyError: the name is no token type.
    """
    return {member.name.lower(): member for member in TokenType}[name]


def mode_byte(token_type: TokenType, *, loss: bool) -> int:
    """The int8 mode of a shard segment: TokenType in bits 0-3, ``no loss`` in bit 4."""
    if token_type == TokenType.PADDING:
        raise DataError("a segment of type PADDING can't be written to a shard: padding exists only in batches")
    return int(token_type) | (0 if loss else NO_LOSS_BIT)


def split_modes(modes: np.ndarray, *, file: str) -> tuple[np.ndarray, np.ndarray]:
    """Split mode bytes into token types (int8) and ``has loss`` (bool), refusing unknown values.

    Args:
        modes: int8 or uint8 array of any shape.
        file: the shard's name, for the message.

    Raises:
        DataError: a mode holds a reserved token type or an unknown bit.
    """
    modes = modes.astype(np.uint8, copy=False)
    types = modes & 0x0F
    known = np.isin(types, [int(member) for member in TokenType if member != TokenType.PADDING])
    bad = ~known | ((modes & 0xE0) != 0)
    if bad.any():
        position = int(np.flatnonzero(bad.reshape(-1))[0])
        value = int(modes.reshape(-1)[position])
        raise DataError(
            f"{file}: segment {position} has mode {value}, which names no token type this version knows; "
            "write the shard again with tools/preprocess_data.py or upgrade symbiotic"
        )
    return types.astype(np.int8), (modes & NO_LOSS_BIT) == 0
