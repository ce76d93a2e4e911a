"""Nothing of ours runs what a file contains, unless it says so: read from the source of the package and its tools."""

import ast

import pytest

from tests.support.repository import ROOT

SOURCES = sorted([*(ROOT / "symbiotic").rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "pretrain_symbiotic.py"])

UNPICKLING = ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "shelve.open", "marshal.load")
ALLOWED = {
    # Bytes that the same line has just made.
    ("symbiotic/distributed/agreement.py", "pickle.loads"),
    # Finds the classes of an index and no others.
    ("symbiotic/training/checkpoint/safe_load.py", "pickle.Unpickler"),
}


def unsafe(source: str) -> list[str]:
    """Calls and bases in a module that can run code out of a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            found += [name for name in map(ast.unparse, node.bases) if name in UNPICKLING]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in UNPICKLING:
            found.append(name)
        elif name == "torch.load" and options.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        elif name.endswith(("np.load", "numpy.load")) and options.get("allow_pickle", "False") != "False":
            found.append("numpy.load with allow_pickle")
        elif name.endswith(("yaml.load", "yaml.unsafe_load", "yaml.full_load")):
            found.append(name)
        if options.get("trust_remote_code") == "True":
            found.append("trust_remote_code=True")
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("pickle.load(file)", ["pickle.load"]),
        ("class Reader(pickle.Unpickler): pass", ["pickle.Unpickler"]),
        ("torch.load(path)", ["torch.load without weights_only=True"]),
        ("torch.load(path, weights_only=False)", ["torch.load without weights_only=True"]),
        ("torch.load(path, weights_only=True)", []),
        ("np.load(path, allow_pickle=True)", ["numpy.load with allow_pickle"]),
        ("np.load(path)", []),
        ("yaml.load(text, Loader)", ["yaml.load"]),
        ("yaml.safe_load(text)", []),
        ("AutoModel.from_pretrained(folder, trust_remote_code=True)", ["trust_remote_code=True"]),
        ("AutoModel.from_pretrained(folder, trust_remote_code=trusts_code_of(folder))", []),
    ],
)
def test_what_is_found(source, found):
    assert unsafe(source) == found


def test_no_module_runs_what_it_reads():
    found = {
        (name, what)
        for name, path in ((str(path.relative_to(ROOT)), path) for path in SOURCES)
        for what in unsafe(path.read_text("utf-8"))
    }
    assert found == ALLOWED
