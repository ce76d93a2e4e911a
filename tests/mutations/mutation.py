"""What one entry of the mutation catalogue says."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """A one-line breakage of the code, and the test that must catch it."""

    name: str
    """Short and unique: the test's id."""
    file: str
    """The file that is broken, relative to the repository."""
    old: str
    """Text that stands in the file exactly once."""
    new: str
    """What it is replaced by."""
    test: str
    """Node id of the test that passes before and fails after."""
    why: str
    """What would go wrong in silence if no test saw it."""
    fails_with: tuple[str, ...] = ("assert ", "AssertionError", "Failed: DID NOT RAISE")
    """The failure's message begins with one of these, so that a crash on the way isn't taken for a catch."""
