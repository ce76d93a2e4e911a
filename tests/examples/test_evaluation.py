"""docs/evaluation.md: its commands are run with the real lm-evaluation-harness and lmms-eval, on exports of a model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from examples.evaluation import make_questions, mmlu_task
from examples.evaluation.lmms_tasks import reading
from tests.examples.evaluation_models import EVALUATION, Exports, make_exports
from tests.support.repository import ROOT
from tests.support.requirements import unavailable
from tests.test_readme import blocks

VERSIONS = EVALUATION / "tested_versions.txt"
SNIPPET = """
import json, sys
from PIL import Image
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
words, pictures = json.loads(sys.argv[1]), json.loads(sys.argv[2])
model = get_model("symbiotic")(pretrained="exported", trust_remote_code=True, dtype="float32", device="cpu")
model.task_dict = {"task": {"test": [Image.open(picture) for picture in pictures]}}
requests = [
    Instance("loglikelihood", (context, word, lambda picture: [picture], index, "task", "test"), 0,
             metadata={"task": "task", "doc_id": index, "repeats": 1})
    for context in ("", "What is <image> called? ") for index in range(len(pictures)) for word in words
]
print(json.dumps(model.loglikelihood(requests)))
"""


@pytest.fixture(scope="session")
def programs(request: pytest.FixtureRequest) -> Path:
    """The bin folder of an environment with the tools beside this one's packages, kept for later runs."""
    versions = VERSIONS.read_bytes()
    digest = hashlib.sha256(versions + sys.prefix.encode()).hexdigest()
    folder = Path(request.config.cache.mkdir("evaluation_tools")) / digest[:16]
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, symlinks=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        own = next(path for path in sys.path if path.endswith("site-packages"))
        # A line that begins with "import" is run: addsitedir also reads the .pth files there, unlike a mere path.
        (packages / "beside.pth").write_text(f"import site; site.addsitedir({own!r})\n")
        command = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-r", VERSIONS]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if result.returncode:
            unavailable(f"the packages of {VERSIONS.name} can't be installed: {result.stderr.strip()[-500:]}")
        (folder / "complete").touch()
    return python.parent


@pytest.fixture(scope="module")
def place(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository's root, with two exports, after all commands of the page."""
    folder = tmp_path_factory.mktemp("evaluation")
    make_exports(folder, spare_rows=False)
    shutil.copytree(EVALUATION, folder / "examples" / "evaluation", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        # No command of the page may need the network; pip has its own switch.
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_BUILD_ISOLATION": "1",
    }

    def run(script: str) -> None:
        command = ["bash", "-euc", script]
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=500
        )
        assert result.returncode == 0, f"{script} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}"

    scripts = blocks(Path("docs/evaluation.md"), "sh")
    text, *others = scripts
    # A line of the first block needs no other; the lines of another block are run in order.
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(run, [*text.splitlines(), *others]))
    return folder


def samples(folder: Path) -> dict[tuple[str, int], dict]:
    """What lm-eval logged: (subject, number of the question) -> its line."""
    found = {}
    for path in folder.glob("*/samples_local_mmlu_*.jsonl"):
        subject = path.name.removeprefix("samples_local_mmlu_").partition("_")[0]
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found[subject, record["doc_id"]] = record
    return found


def reported(record: dict) -> list[float]:
    """Log-likelihoods of the four choices."""
    return [float(response[0][0]) for response in record["resps"]]


def requests(record: dict) -> Iterator[tuple[str, str]]:
    """Context and continuation of the four choices."""
    for index in range(4):
        arguments = record["arguments"][f"gen_args_{index}"]
        yield arguments["arg_0"], arguments["arg_1"]


@pytest.mark.slow
def test_both_exports_have_the_same_log_likelihoods(place: Path) -> None:
    stock, full = samples(place / "results/reader"), samples(place / "results/exported")
    assert len(stock) == 40 and stock.keys() == full.keys()
    for key, record in stock.items():
        assert list(requests(record)) == list(requests(full[key]))
        assert reported(record) == pytest.approx(reported(full[key]), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reader", "exported"])
def test_log_likelihoods_are_those_of_a_forward_pass(name: str, place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / name, trust_remote_code=name == "exported").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / name)
    differences = []
    for record in samples(place / "results" / name).values():
        for (context, continuation), score in zip(requests(record), reported(record), strict=True):
            ids = tokenizer(context + continuation, return_tensors="pt").input_ids
            prompt = len(tokenizer(context).input_ids)
            with torch.inference_mode():
                logits = model(ids).logits[0].double()
            chosen = torch.log_softmax(logits[prompt - 1 : -1], dim=-1).gather(1, ids[0, prompt:, None])
            differences.append(abs(float(chosen.sum()) - score))
    assert len(differences) == 160 and max(differences) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reader", "exported"])
def test_accuracies_are_those_of_the_likeliest_choices(name: str, place: Path) -> None:
    """The prompt has five examples of the dev split with their answers; answers are counted by hand."""
    right: dict[str, list[bool]] = {"arithmetic": [], "words": []}
    for (subject, number), record in samples(place / "results" / name).items():
        question = make_questions.questions(subject, seed=0)["test"][number]
        (context, _), *_ = requests(record)
        examples = context.split("\n\n")[1:]
        for example, (text, *choices, letter) in zip(
            examples, [*make_questions.questions(subject, seed=0)["dev"], question], strict=True
        ):
            lines = [text, *(f"{name}. {choice}" for name, choice in zip("ABCD", choices, strict=True)), "Answer:"]
            assert example == "\n".join(lines) + (f" {letter}" if example is not examples[-1] else "")
        scores = reported(record)
        right[subject].append("ABCD"[scores.index(max(scores))] == question[-1])
    (path,) = (place / "results" / name).glob("*/results_*.json")
    results = json.loads(path.read_text())["results"]
    assert {len(answers) for answers in right.values()} == {20}
    for subject, answers in right.items():
        assert results[f"local_mmlu_{subject}"]["acc,none"] == pytest.approx(sum(answers) / 20)
    assert results["local_mmlu"]["acc,none"] == pytest.approx(sum(map(sum, right.values())) / 40)


@pytest.mark.slow
def test_a_folder_of_csv_files_becomes_the_task_that_is_shipped(place: Path) -> None:
    assert (place / "tasks/mmlu/mmlu_here.yaml").is_file()
    assert (place / "tasks/mmlu/words.test.jsonl").read_bytes() == (
        EVALUATION / "local_mmlu/words.test.jsonl"
    ).read_bytes()


@pytest.mark.slow
def test_lmms_eval_asks_the_model_about_each_picture(place: Path) -> None:
    """In batches of three; here one by one, with the picture's size worked out by hand."""
    model = AutoModelForCausalLM.from_pretrained(place / "exported", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(place / "exported", trust_remote_code=True)
    (path,) = (place / "results/reading").glob("*/*_samples_local_reading.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    words = [json.loads(line)["word"] for line in (EVALUATION / "lmms_tasks/words.jsonl").read_text().splitlines()]
    assert [record["target"] for record in records] == words
    answers = []
    for word in words:
        (picture,) = reading.picture({"word": word})
        # 96 x 24 pixels have the shape of 4 x 16 codes of 2 x 2 pixels.
        picture = picture.convert("L").resize((32, 8), Image.Resampling.LANCZOS)
        inputs = processor([[{"type": "image", "use": "understand", "image": picture}]])
        begin = model.config.image_vocabulary["begin_generation_image"]
        row = model.generate(**inputs, max_new_tokens=16, do_sample=False, suppress_tokens=[begin])[0]
        answers.append(processor.decode(row[inputs["input_ids"].shape[1] :]).partition("\n")[0])
    assert len(set(answers)) > 4, "the pictures make no difference"
    assert [record["filtered_resps"] for record in records] == [answer.strip() for answer in answers]
    for record, answer, word in zip(records, answers, words, strict=True):
        assert record["exact_match"] == float((answer.split() or [""])[0].rstrip(".").lower() == word)


@pytest.mark.slow
def test_lmms_evals_likelihoods_of_a_continuation(place: Path, programs: Path, tmp_path: Path) -> None:
    """The mean negative log-likelihood, after a picture alone and after a picture inside a text."""
    words, pictures = ["seven", "a lamp"], [tmp_path / "0.png", tmp_path / "1.png"]
    # Pixels of 4 x 16 codes, and of 2 x 3: the resolutions whose shapes these pictures have.
    sizes = {pictures[0]: (32, 8), pictures[1]: (6, 4)}
    (picture,) = reading.picture({"word": "seven"})
    picture.save(pictures[0])
    picture.crop((0, 0, 30, 20)).save(pictures[1])
    arguments = [json.dumps(words), json.dumps(list(map(str, pictures)))]
    result = subprocess.run(
        [programs / "python", "-c", SNIPPET, *arguments], cwd=place, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    model = AutoModelForCausalLM.from_pretrained(place / "exported", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(place / "exported", trust_remote_code=True)
    expected = []
    for before, behind in (("", ""), ("What is ", " called?")):
        for path in pictures:
            picture = Image.open(path).convert("L").resize(sizes[path], Image.Resampling.LANCZOS)
            image = {"type": "image", "use": "understand", "image": picture}
            for word in words:
                prompt = processor([[before, image, behind]])["input_ids"].shape[1]
                inputs = processor([[before, image, f"{behind} {word}" if behind else word]])
                with torch.inference_mode():
                    logits = model(**inputs).logits[0, prompt - 1 : -1].double()
                labels = inputs["input_ids"][0, prompt:]
                scores = torch.log_softmax(logits, dim=-1).gather(1, labels[:, None])
                expected.append([-float(scores.mean()), bool((logits.argmax(-1) == labels).all())])
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.slow
def test_geneval_pictures_are_drawn(place: Path) -> None:
    lines = (EVALUATION / "geneval_prompts.jsonl").read_text().splitlines()
    for index, line in enumerate(lines):
        folder = place / "pictures" / f"{index:05}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == json.loads(line)
        assert sorted(path.name for path in (folder / "samples").iterdir()) == ["00000.png", "00001.png"]
        assert Image.open(folder / "samples/00001.png").size == (32, 8)
        assert Image.open(folder / "grid.png").size == (64, 8)


def test_spare_rows_lower_a_stock_exports_likelihoods_by_their_share(exports: Exports) -> None:
    """As the page says: alike for every token at a place, so choices of one token keep their order."""
    full = AutoModelForCausalLM.from_pretrained(exports.exported, trust_remote_code=True).eval()
    stock = AutoModelForCausalLM.from_pretrained(exports.reader).eval()
    ids = AutoTokenizer.from_pretrained(exports.reader)("What is 7 + 5?", return_tensors="pt").input_ids
    with torch.inference_mode():
        ours, theirs = full(ids).logits[0].double(), stock(ids).logits[0].double()
    used = torch.from_numpy(exports.vocabulary.used_mask())
    assert (~used).any()
    share = theirs.softmax(-1)[:, used].sum(-1).log()
    assert share.max() < -1e-3
    difference = theirs.log_softmax(-1)[:, used] - ours.log_softmax(-1)[:, used]
    assert torch.allclose(difference, share[:, None].expand_as(difference), atol=1e-4)


def test_text_without_types_padded_as_the_harness_pads_it(exports: Exports) -> None:
    """The harness passes input_ids and attention_mask only: on the right for likelihoods, on the left to generate."""
    model = AutoModelForCausalLM.from_pretrained(exports.exported, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(exports.exported)
    texts = ["What is 7 + 5?", "Which word is eldnac when it is spelled backwards?"]
    alone = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    types = [torch.full_like(ids, model.config.token_types["text"]) for ids in alone]
    expected = [
        model.generate(ids, token_type_ids=kind, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        for ids, kind in zip(alone, types, strict=True)
    ]
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, padding="longest", return_tensors="pt")
    drawn = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=6, do_sample=False,
        pad_token_id=tokenizer.pad_token_id, use_cache=True,
    )  # fmt: skip
    for row, answer in zip(drawn[:, batch["input_ids"].shape[1] :], expected, strict=True):
        assert row[: len(answer)].tolist() == answer.tolist()
    length = max(ids.shape[1] for ids in alone)
    padded = torch.cat([torch.nn.functional.pad(ids, (0, length - ids.shape[1])) for ids in alone])
    with torch.inference_mode():
        logits = model(padded).logits
        for row, ids, kind in zip(logits, alone, types, strict=True):
            own = model(ids, token_type_ids=kind).logits[0]
            assert torch.allclose(row[: ids.shape[1]].softmax(-1), own.softmax(-1), atol=1e-5)


def test_the_batch_script_runs_the_harness_as_the_page_does(tmp_path: Path) -> None:
    """With programs that stand in for srun and Python: the arguments are those of the page's command."""
    run = tmp_path / "run"
    (run / "export/finished").mkdir(parents=True)
    (run / "exit.json").write_text('{"verdict": "finished"}'.replace("{", "{\n  "))
    (tmp_path / "srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    (tmp_path / "python").write_text(f'#!/bin/bash\nprintf "%s\\n" "$HF_HUB_OFFLINE" "$@" > {tmp_path}/arguments\n')
    for program in ("srun", "python"):
        (tmp_path / program).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN": str(run), "PYTHON": str(tmp_path / "python"),
        "SLURM_SUBMIT_DIR": str(tmp_path), "TASKS": "local_mmlu", "TASK_FOLDER": "tasks", "DEVICE": "cpu",
    }  # fmt: skip
    script = ROOT / "examples/slurm/convert_and_evaluate.sbatch"
    subprocess.run(["bash", str(script)], env=environment, check=True)
    offline, *arguments = (tmp_path / "arguments").read_text().split("\n")[:-1]
    assert offline == "1" and arguments[:2] == ["-m", "lm_eval"]
    given = dict(zip(arguments[2::2], arguments[3::2], strict=True))
    assert given == {
        "--model": "hf", "--model_args": f"pretrained={run}/export/finished,trust_remote_code=True",
        "--tasks": "local_mmlu", "--include_path": "tasks", "--device": "cpu", "--batch_size": "16",
        "--output_path": f"{run}/evaluation/lm_eval",
    }  # fmt: skip
    shown = [word for line in blocks(Path("docs/evaluation.md"), "sh")[0].splitlines() for word in line.split()]
    assert set(given) <= set(shown)


def test_the_shipped_task_is_what_the_two_programs_write(tmp_path: Path) -> None:
    make_questions.write(tmp_path / "questions", seed=0)
    mmlu_task.write(tmp_path / "questions", tmp_path / "task", name="local_mmlu")
    shipped = EVALUATION / "local_mmlu"
    names = sorted(path.name for path in shipped.iterdir() if path.is_file())
    assert names == sorted(path.name for path in (tmp_path / "task").iterdir())
    for name in names:
        assert (shipped / name).read_bytes() == (tmp_path / "task" / name).read_bytes(), name


def test_questions_have_one_right_answer() -> None:
    """Worked out again from the text of the question."""
    for subject in make_questions.SUBJECTS:
        for lines in make_questions.questions(subject, seed=0).values():
            for question, *choices, letter in lines:
                words = question.removesuffix("?").split()
                if "+" in words:
                    right = str(int(words[2]) + int(words[4]))
                elif "times" in words:
                    right = str(int(words[2]) * int(words[4]))
                elif "divided" in words:
                    right = str(int(words[5]) % int(words[9]))
                elif "letters" in words:
                    right = str(len(words[6]))
                elif "dictionary" in words:
                    right = min(choices)
                else:
                    right = words[3][::-1]
                assert len(set(choices)) == 4 and choices["ABCD".index(letter)] == right, question


def test_parquet_files_of_mmlu(tmp_path: Path) -> None:
    """A folder a subject, several files a split, a folder "all" that repeats them."""

    def table(first: int, count: int) -> pyarrow.Table:
        rows = [
            {"question": f"Number {number}?", "subject": "law", "choices": list("wxyz"), "answer": number % 4}
            for number in range(first, first + count)
        ]
        return pyarrow.Table.from_pylist(rows)

    for subject in ("all", "high_school_law"):
        folder = tmp_path / "mmlu" / subject
        folder.mkdir(parents=True)
        pyarrow.parquet.write_table(table(0, 5), folder / "dev-00000-of-00001.parquet")
        pyarrow.parquet.write_table(table(5, 2), folder / "test-00000-of-00002.parquet")
        pyarrow.parquet.write_table(table(7, 1), folder / "test-00001-of-00002.parquet")
    assert mmlu_task.write(tmp_path / "mmlu", tmp_path / "task", name="mmlu") == ["high_school_law"]
    lines = (tmp_path / "task/high_school_law.test.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"question": f"Number {number}?", "choices": ["w", "x", "y", "z"], "answer": number % 4} for number in (5, 6, 7)
    ]
    assert "about high school law." in (tmp_path / "task/mmlu_high_school_law.yaml").read_text()


def spoil(folder: Path, mistake: str) -> None:
    """Make one mistake in a folder of questions."""
    test = folder / "test/words_test.csv"
    if mistake == "no file":
        shutil.rmtree(folder)
        folder.mkdir()
    elif mistake == "split":
        (folder / "dev/words_dev.csv").unlink()
    elif mistake == "examples":
        (folder / "dev/words_dev.csv").write_text("Why?,a,b,c,d,A\n")
    else:
        test.write_bytes(
            {"fields": b"Why?,a,b,c,A\n", "letter": b"Why?,a,b,c,d,E\n", "bytes": b"\xff", "none": b""}[mistake]
        )


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("no file", "holds neither dev/.* nor SUBJECT/test"),
        ("split", "subject 'words' has no dev split"),
        ("examples", "1 questions in dev, but the prompt has 5"),
        ("fields", "words_test.csv:1: 5 fields ending in 'A'"),
        ("letter", "words_test.csv:1: 6 fields ending in 'E'"),
        ("bytes", "words_test.csv can't be read"),
        ("none", "words_test.csv holds no questions"),
    ],
)
def test_what_is_not_in_the_format_is_said(mistake: str, message: str, tmp_path: Path) -> None:
    make_questions.write(tmp_path / "questions", seed=0)
    spoil(tmp_path / "questions", mistake)
    with pytest.raises(mmlu_task.QuestionError, match=message):
        mmlu_task.write(tmp_path / "questions", tmp_path / "task", name="mmlu")
    assert not (tmp_path / "task").exists()
