"""Show a configuration, compare two, or generate docs/configuration.md and docs/megatron_flags.md.

    python tools/config.py show [--check-files] FILE [section.key=value ...]
    python tools/config.py diff FILE OTHER
    python tools/config.py docs [--check]

Only ``--check-files`` looks for the files that a configuration names; none of them needs a GPU.
"""

import argparse
from pathlib import Path

from symbiotic.config import load_config
from symbiotic.config.compare import ABSENT, differences
from symbiotic.config.docs import configuration_page
from symbiotic.config.flags_page import flags_page
from symbiotic.config.yaml_tree import dump_yaml
from symbiotic.errors import ConfigError, exits_on_user_error
from symbiotic.files import write_text

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = {"configuration.md": configuration_page, "megatron_flags.md": flags_page}


def parse_arguments() -> argparse.Namespace:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print the resolved configuration")
    show.add_argument("--check-files", action="store_true", help="refuse it where a file that it names is missing")
    show.add_argument("file", type=Path, help="the configuration")
    show.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    diff = commands.add_parser("diff", help="print the settings in which two configurations differ")
    diff.add_argument("file", type=Path, help="the configuration")
    diff.add_argument("other", type=Path, help="the one to compare it with")
    docs = commands.add_parser("docs", help="write the generated pages of docs/")
    docs.add_argument("--output", type=Path, default=DOCS, help="folder to write them to")
    docs.add_argument("--check", action="store_true", help="only say whether they are up to date")
    return parser.parse_args()


def print_differences(file: Path, other: Path) -> None:
    """One line a setting: ``key: left -> right``."""
    found = differences(load_config(file, check_files=False), load_config(other, check_files=False))
    for difference in found:
        print(f"{difference.key}: {_shown(difference.left)} -> {_shown(difference.right)}")
    if not found:
        print("no difference")


def _shown(value: object) -> str:
    return "(absent)" if value is ABSENT else dump_yaml(value, flow=True)


def write_docs(folder: Path, *, check: bool) -> None:
    """Write the pages, or refuse when one isn't what the schema and the tables give."""
    for name, draw in PAGES.items():
        path, page = folder / name, draw()
        if not check:
            write_text(path, page)
        elif not path.is_file() or path.read_text(encoding="utf-8") != page:
            raise ConfigError(f"{path}: is not up to date; run 'python tools/config.py docs'")


@exits_on_user_error
def main() -> None:
    """Run the command."""
    arguments = parse_arguments()
    if arguments.command == "show":
        config = load_config(arguments.file, arguments.overrides, check_files=arguments.check_files)
        print(dump_yaml(config.to_dict()), end="")
    elif arguments.command == "diff":
        print_differences(arguments.file, arguments.other)
    else:
        write_docs(arguments.output, check=arguments.check)


if __name__ == "__main__":
    main()
