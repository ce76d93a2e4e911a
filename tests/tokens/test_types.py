import numpy as np
import pytest

from symbiotic.errors import DataError
from symbiotic.tokens.types import LossClass, TokenType, mode_byte, split_modes, type_by_name


def test_values_that_stand_in_shards_never_change():
    names = ["TEXT", "UNDERSTANDING_CODE", "GENERATION_CODE", "UNDERSTANDING_FEATURE", "GENERATION_LATENT"]
    assert [TokenType[name] for name in [*names, "CONDITION_LATENT"]] == [0, 1, 2, 3, 4, 5]
    assert TokenType.PADDING == 15
    assert [*LossClass] == [0, 1, 2]


def test_mode_byte_holds_type_and_loss():
    assert mode_byte(TokenType.TEXT, loss=True) == 0
    assert mode_byte(TokenType.UNDERSTANDING_CODE, loss=False) == 0b1_0001
    modes = np.array([0, 0b1_0000, 2, 0b1_0101], dtype=np.int8)
    types, loss = split_modes(modes, file="x.idx")
    assert types.dtype == np.int8
    assert types.tolist() == [0, 0, 2, 5]
    assert loss.tolist() == [True, False, True, False]


def test_padding_is_never_written():
    with pytest.raises(DataError, match="PADDING can't be written"):
        mode_byte(TokenType.PADDING, loss=True)


@pytest.mark.parametrize("mode", [6, 14, 15, 0x20, -128])
def test_unknown_modes_are_refused_with_file_and_segment(mode):
    with pytest.raises(DataError, match=rf"^x\.idx: segment 1 has mode {mode % 256},"):
        split_modes(np.array([0, mode], dtype=np.int8), file="x.idx")


def test_types_by_name():
    assert type_by_name("generation_code") == TokenType.GENERATION_CODE
    with pytest.raises(KeyError):
        type_by_name("GENERATION_CODE")
