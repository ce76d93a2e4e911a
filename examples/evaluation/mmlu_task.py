"""Turn a local folder of questions in MMLU's format into a task of lm-evaluation-harness that needs no network.

    python examples/evaluation/mmlu_task.py --questions data --output tasks/mmlu --name mmlu_here
    lm_eval --model hf --model_args pretrained=reader --include_path tasks/mmlu --tasks mmlu_here

QUESTIONS is what MMLU is published as: the archive's folders dev/ and test/ with SUBJECT_dev.csv and SUBJECT_test.csv
(question, four choices, letter of the answer; no header), or a copy of the Parquet data set with a folder a subject
that holds dev-*.parquet and test-*.parquet (columns question, choices, answer). OUTPUT then holds the questions as
JSONL, a task for each subject, named NAME_SUBJECT, and a group NAME over them. It can be moved: nothing in it is an
absolute path. Prompt, 5 examples of the dev split in their order and scoring are those of the harness's own MMLU.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LETTERS = "ABCD"
SPLITS = ("dev", "test")
NUM_FEWSHOT = 5

TEMPLATE = """\
# Every subject includes this file. Prompt and scoring are those of the harness's own MMLU.
custom_dataset: !function questions.load
output_type: multiple_choice
test_split: test
fewshot_split: dev
num_fewshot: {num_fewshot}
fewshot_config:
  sampler: first_n
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nC. {{{{choices[2]}}}}\\nD. \
{{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
SUBJECT = """\
include: _template.yaml
task: {name}_{subject}
task_alias: {subject}
description: "The following are multiple choice questions (with answers) about {title}.\\n\\n"
dataset_kwargs:
  subject: {subject}
"""
GROUP = """\
group: {name}
task:
{tasks}
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
metadata:
  version: 1.0
"""
LOADER = '''\
"""Questions of one subject, from the files beside this one: what the tasks of this folder load."""

import json
from pathlib import Path

from datasets import Dataset


def load(subject: str, **_: object) -> dict[str, Dataset]:
    """The splits ``dev`` and ``test``; the harness also passes the task's metadata."""
    splits = {}
    for split in ("dev", "test"):
        lines = (Path(__file__).parent / f"{subject}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
        splits[split] = Dataset.from_list([json.loads(line) for line in lines])
    return splits
'''


class QuestionError(ValueError):
    """A folder or file that isn't in MMLU's format; the message is the whole explanation."""


def read_csv(path: Path) -> Iterator[dict[str, Any]]:
    """Questions of a CSV file: question, four choices, letter."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for number, fields in enumerate(csv.reader(file), start=1):
                if len(fields) != 6 or fields[5].strip() not in list(LETTERS):
                    raise QuestionError(
                        f"{path}:{number}: {len(fields)} fields ending in {fields[-1] if fields else ''!r}, but a "
                        "line is question, four choices and the letter A, B, C or D of the answer"
                    )
                question, *choices, letter = fields
                yield {"question": question, "choices": choices, "answer": LETTERS.index(letter.strip())}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise QuestionError(f"{path} can't be read ({error}); give MMLU's CSV files in UTF-8") from error


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Questions of a Parquet file with the columns question, choices and answer."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=["question", "choices", "answer"])
    except (OSError, pyarrow.ArrowException) as error:
        raise QuestionError(
            f"{path} can't be read ({error}); MMLU's files have the columns question, choices, answer"
        ) from error
    for number, row in enumerate(table.to_pylist(), start=1):
        right_form = (
            isinstance(row["question"], str)
            and isinstance(row["choices"], list)
            and len(row["choices"]) == len(LETTERS)
            and isinstance(row["answer"], int)
            and 0 <= row["answer"] < len(LETTERS)
        )
        if not right_form:
            raise QuestionError(f"{path}: row {number} has no four choices with an answer from 0 to 3: {row}")
        yield row


def find_subjects(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Files of each subject and split, by name.

    Raises:
        QuestionError: there is none, or a subject lacks a split.
    """
    subjects: dict[str, dict[str, list[Path]]] = {}
    for split in SPLITS:
        for path in sorted(folder.glob(f"{split}/*_{split}.csv")):
            subjects.setdefault(path.stem.removesuffix(f"_{split}"), {})[split] = [path]
        for path in sorted(folder.glob(f"*/{split}-*.parquet")):
            # "all" repeats every subject.
            if path.parent.name != "all":
                subjects.setdefault(path.parent.name, {}).setdefault(split, []).append(path)
    if not subjects:
        raise QuestionError(f"{folder} holds neither dev/*_dev.csv and test/*_test.csv nor SUBJECT/test-*.parquet")
    for subject, splits in subjects.items():
        for split in SPLITS:
            if split not in splits:
                raise QuestionError(f"{folder}: subject {subject!r} has no {split} split; copy both dev and test")
    return subjects


def read(paths: list[Path]) -> list[dict[str, Any]]:
    """Questions of the files of one subject and split (QuestionError where there are none)."""
    rows = [row for path in paths for row in (read_csv(path) if path.suffix == ".csv" else read_parquet(path))]
    if not rows:
        raise QuestionError(f"{paths[0]} holds no questions")
    return rows


def write(questions: Path, output: Path, *, name: str) -> list[str]:
    """Write the task folder; returns the subjects.

    Raises:
        QuestionError: the questions aren't in MMLU's format (nothing is written then), or ``output`` holds files.
    """
    if not name.isidentifier():
        raise QuestionError(f"--name {name!r} can't name a task; use letters, digits and underscores")
    if output.exists() and any(output.iterdir()):
        raise QuestionError(f"{output} is not empty; give a folder that doesn't exist yet")
    subjects = {
        subject: {split: read(paths) for split, paths in splits.items()}
        for subject, splits in sorted(find_subjects(questions).items())
    }
    for subject, splits in subjects.items():
        num_dev = len(splits["dev"])
        if num_dev < NUM_FEWSHOT:
            raise QuestionError(f"subject {subject!r}: {num_dev} questions in dev, but the prompt has {NUM_FEWSHOT}")
    output.mkdir(parents=True, exist_ok=True)
    files = {"_template.yaml": TEMPLATE.format(num_fewshot=NUM_FEWSHOT), "questions.py": LOADER}
    for subject, splits in subjects.items():
        files[f"{name}_{subject}.yaml"] = SUBJECT.format(name=name, subject=subject, title=subject.replace("_", " "))
        for split, rows in splits.items():
            columns = ("question", "choices", "answer")
            lines = [json.dumps({key: row[key] for key in columns}, ensure_ascii=False) for row in rows]
            files[f"{subject}.{split}.jsonl"] = "\n".join(lines) + "\n"
    files[f"{name}.yaml"] = GROUP.format(name=name, tasks="\n".join(f"  - {name}_{subject}" for subject in subjects))
    for file, content in files.items():
        (output / file).write_text(content, encoding="utf-8")
    return list(subjects)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True, help="folder of MMLU's CSV or Parquet files")
    parser.add_argument("--output", type=Path, required=True, help="folder for the task, new or empty")
    parser.add_argument("--name", default="local_mmlu", help="of the group; subjects add theirs (default local_mmlu)")
    arguments = parser.parse_args()
    try:
        subjects = write(arguments.questions, arguments.output, name=arguments.name)
    except QuestionError as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.output}: task {arguments.name} with {len(subjects)} subjects")


if __name__ == "__main__":
    main()
