"""The layer pattern: blocks of attention and feed-forward as HybridModel's string, cut for the pipeline.

A block is ``*E`` (attention, MoE layer) or ``*-`` (attention, dense MLP). HybridModel counts attention and
feed-forward as layers of their own, so a model of n blocks has 2 n layers, and ``|`` separates pipeline chunks.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

ATTENTION, MOE, DENSE, CUT = "*", "E", "-", "|"


@dataclass(frozen=True)
class LayerPattern:
    """The feed-forward kind of every block.

    Attributes:
        feed_forward: one symbol a block, ``E`` or ``-``.
    """

    feed_forward: str

    @classmethod
    def from_blocks(cls, blocks: int, dense_blocks: Collection[int] = ()) -> LayerPattern:
        """``blocks`` blocks of which the numbers in ``dense_blocks``, from 0, are dense."""
        return cls("".join(DENSE if block in dense_blocks else MOE for block in range(blocks)))

    @classmethod
    def parse(cls, text: str) -> LayerPattern:
        """Read a pattern such as ``*-*E*E``.

        Raises:
            ValueError: what is wrong with the pattern, in words that fit behind its name and value.
        """
        if CUT in text:
            raise ValueError("must not have pipeline cuts ('|'): they follow from the parallel sizes")
        for position, symbol in enumerate(text):
            if symbol not in (ATTENTION, MOE, DENSE):
                raise ValueError(
                    f"has {symbol!r} at position {position + 1}: use '*' attention, 'E' MoE layer, '-' dense MLP"
                )
        if not text or len(text) % 2 or set(text[0::2]) != {ATTENTION} or ATTENTION in text[1::2]:
            raise ValueError("must be blocks of '*E' (attention and MoE layer) or '*-' (attention and dense MLP)")
        return cls(text[1::2])

    @property
    def num_blocks(self) -> int:
        """Blocks of the model."""
        return len(self.feed_forward)

    @property
    def num_layers(self) -> int:
        """Layers as HybridModel counts them: the symbols of the pattern."""
        return 2 * self.num_blocks

    @property
    def moe_blocks(self) -> tuple[int, ...]:
        """Numbers, from 0, of the blocks with an MoE layer."""
        return tuple(block for block, kind in enumerate(self.feed_forward) if kind == MOE)

    @property
    def dense_blocks(self) -> tuple[int, ...]:
        """Numbers, from 0, of the blocks with a dense MLP."""
        return tuple(block for block, kind in enumerate(self.feed_forward) if kind == DENSE)

    def chunks(self, count: int) -> list[range]:
        """Block numbers of ``count`` pipeline chunks, in the order of the model.

        The blocks are spread evenly; where they don't divide, the chunks in the middle get one more, since the
        first also holds the embedding and the last the output layer.
        """
        assert 1 <= count <= self.num_blocks, "the configuration's checks guarantee a block for each chunk"
        base, extra = divmod(self.num_blocks, count)
        first = (count - extra) // 2
        sizes = [base + (first <= chunk < first + extra) for chunk in range(count)]
        starts = [sum(sizes[:chunk]) for chunk in range(count)]
        return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]

    def text(self, *, pipeline: int = 1, virtual_pipeline: int | None = None) -> str:
        """HybridModel's main pattern.

        Args:
            pipeline: pipeline-parallel size.
            virtual_pipeline: chunks on each pipeline rank; chunk c of the model lies on rank c % pipeline.
        """
        cuts = self.chunks(pipeline * (virtual_pipeline or 1))
        return CUT.join("".join(ATTENTION + self.feed_forward[block] for block in chunk) for chunk in cuts)
