"""The documentation: its code blocks run, its commands start, its files and links exist."""

import ast
import configparser
import importlib.util
import inspect
import itertools
import json
import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

import forked
import jax
import numpy as np
import pytest

from ant_jax import config as config_lib
from ant_jax import evaluate, mtl, sample, train
from configs import digits
from experiments import presets, runner

ROOT = Path(__file__).parents[1]
# All pages of the site that are not made from docstrings.
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / folder / "RESULTS.md" for folder in ("experiments", "benchmarks")),
]
LANGUAGES = {"python", "shell", "text"}
# The first line of a block that cannot run. Keep them few.
NOT_TESTED = re.compile(r"# Not tested: \w.+")
MOST_NOT_TESTED = 3


class Block(NamedTuple):
    """A fenced block: the number of its first line, its language, its text."""

    line: int
    language: str
    text: str


def blocks_of(text):
    found, begun = [], None
    for number, line in enumerate(text.splitlines(), 1):
        if fence := re.match(r" *```(.*)", line):
            if begun is None:
                begun, lines = (number, fence[1]), []
            else:
                found.append(Block(*begun, textwrap.dedent("\n".join(lines))))
                begun = None
        elif begun is not None:
            lines.append(line)
    assert begun is None, f"the block of line {begun} does not end"
    return found


def blocks_to_test(text, language):
    of_language = (block for block in blocks_of(text) if block.language == language)
    return [block for block in of_language if not NOT_TESTED.match(block.text)]


def check_languages(text):
    for line, language, _ in blocks_of(text):
        assert language in LANGUAGES, f"line {line}: write one of {sorted(LANGUAGES)} behind ```"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_have_a_language_that_is_tested(page):
    check_languages(page.read_text())


def test_few_blocks_are_not_tested():
    blocks = [block for page in PAGES for block in blocks_of(page.read_text())]
    marked = [block for block in blocks if NOT_TESTED.match(block.text)]
    assert len(marked) <= MOST_NOT_TESTED, marked


OBJECTS = inspect.signature(train.train).parameters.keys()


def bound_as(function):
    """Instead of a function that trains or draws: only its arguments are checked."""

    def call(*args, **given):
        inspect.signature(function).bind(*args, **given)
        assert given.keys() <= OBJECTS

    return call


def check_presets(main, names=()):
    """Instead of an experiment."""
    for preset in presets.PRESETS.values():
        config = preset.config("nash,snr")
        config_lib.update(config, preset.settings)
        config_lib.validate(config)


def train_small(config, workdir):
    """A run that says that it was evaluated at its last step."""
    train.train(config, workdir)
    log = Path(workdir, "metrics.jsonl")
    *lines, last = log.read_text().splitlines()
    last = json.dumps(json.loads(last) | {"frechet_distance": 1.0})
    log.write_text("\n".join([*lines, last]) + "\n")


@pytest.fixture(scope="module")
def scope_of(tmp_path_factory):
    """The names that the Python blocks of a page define, which run one after the other."""
    folder, scopes = tmp_path_factory.mktemp("docs"), {(): {}}
    config = digits.get_config("nash,snr")
    small = {"num_steps": 2, "data.batch_size": 40, "log_every": 1, "sample.every": 0, "log_to": ()}
    config_lib.update(config, small | {"model.width": 8, "model.depth": 1, "model.heads": 1})

    def after(blocks):
        # README.md begins as another page does.
        if blocks not in scopes:
            scope = {"__name__": "__main__", "config": config, "workdir": "runs/own"}
            scopes[blocks] = scope | after(blocks[:-1])
            exec(compile(blocks[-1], "<block>", "exec"), scopes[blocks])
        return scopes[blocks]

    def scope(page):
        blocks = tuple(block.text for block in blocks_to_test(page.read_text(), "python"))
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.chdir(folder)
            monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
            monkeypatch.setattr(jax, "device_count", lambda: 1)
            reads_run = any("load_run" in block for block in blocks)
            if reads_run and not Path("runs").exists():
                train_small(config, "runs/digits-nash-snr-0")
            for module, name in ((train, "train"), (sample, "sample"), (evaluate, "evaluate")):
                monkeypatch.setattr(module, name, bound_as(getattr(module, name)))
            monkeypatch.setattr(presets, "PRESETS", dict(presets.PRESETS))
            monkeypatch.setattr(runner, "start", check_presets)
            return after(blocks)

    return scope


WITH_PYTHON = [page for page in PAGES if blocks_to_test(page.read_text(), "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_blocks_run(page, scope_of):
    scope_of(page)


def test_the_transforms_in_ones_own_loop(scope_of):
    """They do what the text beside them says."""
    page = ROOT / "docs" / "own_loop.md"
    blocks = blocks_to_test(page.read_text(), "python")
    assert blocks_to_test((ROOT / "README.md").read_text(), "python")[0].text == blocks[0].text
    for block in blocks:
        assert len([line for line in block.text.splitlines() if line.strip()]) <= 17
    scope = scope_of(page)
    first, last = (
        scope["task_losses"](kernel, scope["batch"])
        for kernel in (np.ones((3, 2)), scope["kernel"])
    )
    assert (last < first / 2).all()
    assert scope["at_features"].gradient["heads"].shape == (3, 2)
    assert (np.asarray(scope["at_features"].state.weights) > 0).all()
    np.testing.assert_allclose(
        scope["method"][0].gram, mtl.gramian(scope["stacked"]["trunk"]), rtol=1e-5
    )
    assert scope["updates"]["heads"].any()
    combined = scope["state"][0]
    # Nash's solution alpha = k w, up to the ridge on these nearly opposed gradients.
    alpha, gram = 2 * np.asarray(combined.weights), np.asarray(combined.gram)
    np.testing.assert_allclose(alpha * (gram @ alpha), 1, rtol=0.02)
    start = np.sum((scope["targets"] - np.zeros(2)) ** 2, 1)
    assert (np.asarray(scope["losses"]) < start).all()


def test_the_aggregator_of_a_trunk(scope_of):
    updates = scope_of(ROOT / "docs" / "methods.md")["updates"]
    assert {name: update.shape for name, update in updates.items()} == {
        "trunk": (3,),
        "heads": (2,),
    }


def test_the_reference_has_a_page_for_every_kind_of_component():
    (pages,) = (
        ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "docs" / "site.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "PACKAGES"
    )
    folders = {group.folder for group in config_lib.GROUPS if group.folder}
    assert folders | {"ant_jax.evaluation.metrics"} <= set(pages.values())
    listed = re.findall(r": api/(\w+)\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(pages)


COMMAND = re.compile(r"`((?:\.venv/bin/)?(?:python|pip|make|ant-jax) [^`]+)`")


LOOP = re.compile(r"for (\w+) in (.+); do")


def unrolled(script):
    """The lines of a script, those of its loops once for each value."""
    values = {}
    for line in script.replace("\\\n", " ").splitlines():
        if loop := LOOP.fullmatch(line.strip()):
            values[loop[1]] = loop[2].split()
        elif line.strip() != "done":
            used = [name for name in values if f"${name}" in line]
            for each in itertools.product(*(values[name] for name in used)):
                found = dict(zip(used, each, strict=True))
                yield re.sub(
                    r"\$(\w+)", lambda name, found=found: found.get(name[1], name[0]), line
                )


def command_lines(text):
    """The words of all commands: those of the shell blocks, and those between the text."""
    lines = [line for block in blocks_to_test(text, "shell") for line in unrolled(block.text)]
    outside = re.sub(r"(?ms)^ *```.*?^ *```", "", text)
    lines += [" ".join(line.split()) for line in COMMAND.findall(outside)]
    for line in lines:
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


def is_placeholder(word):
    return re.search(r"\b[A-Z]{3,}\b", word) or "..." in word


def exists(name):
    return is_placeholder(name) or any((ROOT).glob(name.rstrip("/")))


def fault_of(words, commands):
    """What is wrong with a command; one of ours is appended to ``commands`` instead."""
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "ant-jax":
        program, rest = "python", ["-m", f"ant_jax.{'report' if rest[0] == 'report' else 'main'}"]
        rest += words[1 + (rest[-1] == "ant_jax.report") :]
    if program == ".":
        # What `make` makes.
        return [] if words[1:] == [".venv/bin/activate"] else [f"no file {words[1:]}"]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        return [f"no target {each}" for each in rest if "=" not in each and each not in targets]
    if program == "pip":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        asked = re.findall(r"\[([\w,]+)\]", " ".join(rest))
        known = setup["options.extras_require"]
        extras = [extra for each in asked for extra in each.split(",")]
        return [f"no extra {each}" for each in extras if each not in known and each != "EXTRA"]
    if program == "pre-commit":
        return [] if (ROOT / ".pre-commit-config.yaml").exists() else ["no hooks"]
    if program == "export":
        return [f"{each} is no assignment" for each in rest if "=" not in each]
    if program != "python":
        return [f"unknown program {program}"]
    if rest[0] == "-c":
        ast.parse(rest[1])
    elif rest[0] != "-m":
        return [] if exists(rest[0]) else [f"no file {rest[0]}"]
    elif len(rest) == 1:
        return []
    elif rest[1].split(".")[0] in ("ant_jax", "experiments", "benchmarks"):
        if not is_placeholder(rest[1]):
            rest = [re.sub(r"\bFILE\b", "configs/digits.py", each) for each in rest]
            command = [each for each in rest if each != "--help"]
            commands += [command] * (command not in commands)
    elif importlib.util.find_spec(rest[1]) is None:
        return [f"no module {rest[1]}"]
    return [
        f"no file {each}" for each in rest[2:] if each.startswith("tests/") and not exists(each)
    ]


def faults_of(texts, folder):
    """What is wrong with the commands of each of these pages."""
    faults, commands = [], []
    for text in texts:
        commands.append([])
        faults.append([])
        for words in command_lines(text):
            faults[-1] += [(shlex.join(words), each) for each in fault_of(words, commands[-1])]
    path = folder / "commands.json"
    path.write_text(json.dumps(commands))
    ((status, said),) = forked.run([["tests/commands.py", path]], devices=1)
    assert status == 0, said
    for of_page, lines, wrong in zip(
        faults, commands, json.loads(said.splitlines()[-1]), strict=True
    ):
        of_page += [
            (shlex.join(line), each) for line, each in zip(lines, wrong, strict=True) if each
        ]
    return faults


def test_commands_start(tmp_path):
    """Up to what they do: their flags are parsed, and their configs are built."""
    faults = faults_of([page.read_text() for page in PAGES], tmp_path)
    named = {page.name: each for page, each in zip(PAGES, faults, strict=True) if each}
    assert not named, json.dumps(named, indent=1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    folders = "|".join(
        path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."
    )
    for path in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./*-]*\w", text):
        if not path.startswith(("runs/", "photographs/")):
            assert exists(path), path


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


PAGE = """
```{language}
{code}
```
"""
WRONG = {
    "python -m ant_jax.main --config configs/digits.py --config.num_step=3": "did you mean",
    "python -m ant_jax.main --config configs/digits.py:no_such,snr": "no_such",
    "python -m ant_jax.main --config configs/none.py": "none.py",
    "python -m experiments.none": "no module experiments.none",
    "python -m experiments.table --preset none": "there are only",
    "python -m benchmarks.step --no_such_flag": "unrecognized arguments",
    "python examples/none.py": "no file",
    "make nothing": "no target nothing",
    "pip install '.[experiment]'": "no extra experiment",
    "gcloud create": "unknown program gcloud",
    "for x in 1 digits; do\n  python -m ant_jax.main --config.sample.num=1$x\ndone": "sample.num",
}


def test_what_is_wrong_is_found(tmp_path):
    with pytest.raises(AssertionError, match="line 2: write one of"):
        check_languages(PAGE.format(language="bash", code=""))
    blocks = [PAGE.format(language="shell", code=code) for code in WRONG]
    faults = faults_of([*blocks, "Try `make nothing` today."], tmp_path)
    for fault, words in zip(faults, [*WRONG.values(), "no target"], strict=True):
        ((_, said),) = fault
        assert words in said
    marked = PAGE.format(language="shell", code="# Not tested: needs a cloud\ngcloud create")
    assert faults_of([marked], tmp_path) == [[]]
