"""The command that verifies shards."""

import subprocess
import sys

from symbiotic.data.shards import shard_path
from tests.data.corpora import Text, make_vocabulary, write_shard
from tests.support.repository import ROOT


def verify(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools/verify_data.py", *arguments]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)


def test_good_shards_are_listed_and_bad_ones_fail_the_command(tmp_path):
    vocabulary = make_vocabulary()
    vocabulary.save(tmp_path / "vocabulary.json")
    good, bad = tmp_path / "good", tmp_path / "bad"
    for prefix in (good, bad):
        write_shard(prefix, [[Text((1, 2, 3))], [Text((4,), loss=False)]], vocabulary)
    tokens = shard_path(bad, ".bin").read_bytes()
    shard_path(bad, ".bin").write_bytes(tokens[:-1] + b"\x01")

    result = verify(good, "--vocabulary", tmp_path / "vocabulary.json")
    assert (result.returncode, result.stdout) == (0, f"{good}: 2 documents, 4 tokens (text 4)\n")
    result = verify(bad, good)
    assert result.returncode == 1
    assert result.stderr == (
        f"error: {shard_path(bad, '.bin')}: the content differs from the manifest's SHA-256; copy the shard again\n"
    )
    assert f"{good}: 2 documents" in result.stdout
