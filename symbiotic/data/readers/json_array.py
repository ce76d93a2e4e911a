"""A file with one JSON array of records, as LLaVA's are: read as a stream, element by element."""

import codecs
import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

from symbiotic.data.readers.records import DECODER, MAX_RECORD_BYTES, Chunk, RawRecord, Unreadable
from symbiotic.errors import DataError

_BLOCK_BYTES = 1 << 20
_SPACE = " \t\r\n"


def read(chunk: Chunk, columns: Sequence[str] | None) -> Iterator[RawRecord | Unreadable]:
    """The elements of the array.

    Raises:
        DataError: the file is no JSON array, or torn.
    """
    with open(chunk.file, "rb") as file:
        text = _Text(file, chunk.file)
        if text.next_character() != "[":
            raise DataError(f"{chunk.file}: a .json file must hold one array of records; name JSON lines .jsonl")
        text.position += 1
        number, done = 0, 0
        if text.next_character() == "]":
            text.position += 1
        else:
            while True:
                number += 1
                value = text.next_value(number)
                read_now = min(file.tell(), chunk.num_bytes) - done
                done += read_now
                if isinstance(value, DataError):
                    yield Unreadable(chunk.file, number, str(value), read_now)
                else:
                    yield RawRecord(chunk.file, number, value, read_now)
                separator = text.next_character()
                text.position += 1
                if separator == "]":
                    break
                if separator != ",":
                    raise DataError(f"{chunk.file}: no comma behind element {number} of the array; write it again")
        if text.next_character():
            raise DataError(f"{chunk.file}: there is something behind the array; a .json file must hold one array")


class _Text:
    """The decoded text of a file, of which only the part under work is held."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file = file
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._ended = False
        self.position = 0

    def next_character(self) -> str:
        """The next character that isn't white space, without taking it; empty at the end of the file."""
        while True:
            while self.position < len(self._text):
                if self._text[self.position] not in _SPACE:
                    return self._text[self.position]
                self.position += 1
            if not self._more(_BLOCK_BYTES):
                return ""

    def next_value(self, number: int) -> Any:
        """Take the next JSON value; a DataError is given back for one that is well formed but not allowed.

        Raises:
            DataError: there is no value.
        """
        self.next_character()
        wanted = _BLOCK_BYTES
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self.position)
            except DataError as error:
                # Refused in the middle of an object: read the same element again without that check to find its end.
                return self._refused(error, number)
            except (ValueError, RecursionError) as error:
                # Twice as much each time, so that a long element isn't decoded over and over.
                if len(self._text) - self.position > MAX_RECORD_BYTES or not self._more(wanted):
                    raise DataError(f"{self._name}: element {number} isn't JSON ({error}); write it again") from error
                wanted *= 2
                continue
            # A number may go on behind the part that is held.
            if end == len(self._text) and self._more(_BLOCK_BYTES):
                continue
            self.position = end
            return value

    def _refused(self, error: DataError, number: int) -> DataError:
        wanted = _BLOCK_BYTES
        while True:
            try:
                _, self.position = json.JSONDecoder().raw_decode(self._text, self.position)
            except (ValueError, RecursionError) as other:
                if not self._more(wanted):
                    raise DataError(f"{self._name}: element {number} isn't JSON ({other}); write it again") from other
                wanted *= 2
            else:
                return error

    def _more(self, size: int) -> bool:
        """Hold more of the file; False when there is no more."""
        if self._ended:
            return False
        data = self._file.read(size)
        self._ended = not data
        try:
            text = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._name}: the file isn't UTF-8 ({error.reason}); convert it") from error
        self._text = self._text[self.position :] + text
        self.position = 0
        return bool(data)
