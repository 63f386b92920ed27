"""What the texts promise exists."""

from __future__ import annotations

import ast
import dataclasses
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

import rear_scale
from rear_scale import config
from rear_scale.config import ExperimentConfig, reference, renamed
from rear_scale.config.fields import declarations
from rear_scale.config.overrides import check_override, field_type
from rear_scale.parallel import facts

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
TEXTS = [
    *PAGES,
    ROOT / "configs/README.md",
    *sorted((ROOT / "configs").rglob("*.yaml")),
    *sorted((ROOT / "launchers").iterdir()),
    *sorted((ROOT / "launchers/slurm").iterdir()),
]
TEXTS = [path for path in TEXTS if path.is_file()]


def name_in_ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", TEXTS, ids=name_in_ids)
def test_every_path_and_config_that_a_text_names_is_there(path: Path) -> None:
    text = path.read_text()
    for named in re.findall(r"(?:launchers|configs|rear_scale|tests|data|docs)/[\w/.-]*\w", text):
        if not named.startswith("data/imagenet256") and "NAME" not in named:
            assert (ROOT / named).exists(), named
    for named in re.findall(r"--config (\w[\w/.]*\.yaml)", text):
        assert (config.CONFIG_DIR / named).is_file() or named == "own.yaml", named  # docs/training.md shows that one


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_in_ids)
def test_every_link_of_a_page_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(page), target


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=name_in_ids)
def test_every_option_of_a_page_exists(path: Path) -> None:
    text = path.read_text()
    sections = "|".join(field.name for field in dataclasses.fields(ExperimentConfig))
    # Not the folders and files of these names, nor the names of modules.
    for option in re.findall(rf"(?<![\w/.])((?:{sections})\.[a-z_]+(?:\.[a-zA-Z_]+)*)(?![\w/(])", text):
        if option.split(".")[1] not in ("py", "sh", "yaml", "sbatch"):
            field_type(option)
    groups = {path.name for path in config.CONFIG_DIR.iterdir() if path.is_dir()}
    for group, value in re.findall(r"(?<![\w.])(\w+)=(\w+)", text):
        if group in groups and value not in OF_EXTENDING:
            assert (config.CONFIG_DIR / group / f"{value}.yaml").is_file(), f"{group}={value}"


OF_EXTENDING = ("ddp_fp16", "tiles")  # what docs/extending.md adds


@pytest.mark.parametrize("path", PAGES, ids=name_in_ids)
def test_every_command_of_a_page_takes_its_options(path: Path) -> None:
    for script, line in commands(path.read_text()):
        words = line.split()
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in options_of(script), f"{script} {word}"
            elif re.match(r"[\w.]+=", word) and word.partition("=")[0] != "--config" and "..." not in word:
                check_override(word)


def commands(text: str) -> list[tuple[str, str]]:
    """(script, its arguments) of each command in code: indented, or between backticks."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    code = [line for line in lines if re.match(r" {4,}\S", line)] + re.findall(r"`([^`]+)`", text)
    found = [re.search(r"(launchers/demo\.sh|(?:launchers|data)/\S+\.(?:py|sbatch))\b([^#|;]*)", line) for line in code]
    return [(match[1], match[2]) for match in found if match]


@cache
def options_of(script: str) -> set[str]:
    """What a script, the modules that it names and the folder of its name have as options. A shell script takes those of the
    launcher that it starts."""
    name = re.sub(r"slurm/(\w+)\.sbatch|(\w+)\.sh", r"\1\2.py", script)
    source = (ROOT / name).read_text()
    modules = re.findall(r"rear_scale(?:\.\w+)+", source)
    files = [ROOT / f"{module.replace('.', '/')}.py" for module in [*modules, "rear_scale.cli"]]
    files += (ROOT / "rear_scale" / Path(name).stem).glob("*.py")
    texts = [source, *(file.read_text() for file in files if file.is_file())]
    return {option for text in texts for option in re.findall(r"\"(--[\w-]+)\"", text)}


def test_the_commands_of_the_pages_are_seen() -> None:
    found = {script for page in PAGES for script, _ in commands(page.read_text())}
    scripts = {name_in_ids(path) for path in [*(ROOT / "launchers").rglob("*.*"), *(ROOT / "data").glob("*.py")]}
    assert found <= scripts
    assert {script for script in scripts if script.endswith((".py", ".sbatch"))} - found <= WITHOUT_A_COMMAND
    assert "--sweep" in options_of("launchers/evaluate.py")


# Called by other scripts, or shown by name alone.
WITHOUT_A_COMMAND = {"launchers/demo.py"}


def test_the_reference_of_fields_is_that_of_the_schema() -> None:
    written = (config.CONFIG_DIR / "README.md").read_text(encoding="utf-8")
    assert written == reference.text(), "run: python -m rear_scale.config.reference > configs/README.md"
    for name, own in declarations(ExperimentConfig).items():
        assert f"`{name}`" in written or not own.doc, name


def test_the_readme_is_short_and_its_first_screen_has_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    first = lines[:15]
    assert any("bash launchers/demo.sh" in line for line in first)
    assert any("bash launchers/test.sh" in line for line in first)


def test_the_config_for_own_images_is_one(tmp_path: Path) -> None:
    [shown] = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs/training.md").read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "own.yaml").write_text(shown)
    cfg = config.load(str(tmp_path / "own.yaml"))
    plan = config.derive(cfg, 1, 300)
    assert (plan.accumulation, cfg.tokenizer.training.images) == (1, "own/images/train")


def test_the_messages_that_are_explained_are_those_of_the_program() -> None:
    files = [*(ROOT / "rear_scale").rglob("*.py"), *(ROOT / "launchers").glob("*.py")]
    # A message may be written in several strings, one below the other.
    source = "".join(re.sub(r"\"\s*\n\s*f?\"", "", path.read_text()) for path in files)
    table = (ROOT / "docs/training.md").read_text().split("## When something goes wrong")[1]
    rows = re.findall(r"^\| (`.*?`(?:, `.*?`)*) \|", table, re.MULTILINE)
    assert len(rows) > 10
    for message in re.findall(r"`([^`]+)`", " ".join(rows)):
        for words in message.split("..."):
            assert words.strip(" ,:/") in source, message


def test_the_changelog_lists_every_renamed_key() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    for old, new in renamed.KEYS.items():
        assert re.search(rf"\| `{old}\b.* \| `{new}\b", text), old


def test_the_citation_names_this_version() -> None:
    values = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert values["version"] == rear_scale.__version__
    assert [len(paper["authors"]) for paper in values["references"]] == [9, 5]


def import_order() -> list[str]:
    """The folders and files of rear_scale, as its docstring lists them."""
    assert rear_scale.__doc__ is not None
    return re.findall(r"\w+", rear_scale.__doc__.split("\n\n")[-1])


def name_of(path: Path) -> str:
    """As the import statement has it, without rear_scale in front; of a package's __init__.py the package."""
    return ".".join(path.relative_to(ROOT / "rear_scale").with_suffix("").parts).removesuffix(".__init__")


# Imports nothing, so that config/ may read it; it stands before all folders.
FACTS = "parallel.facts"
MODULES = {name_of(path): path for path in (ROOT / "rear_scale").rglob("*.py")}

# Modules that are imported inside a function, by the module that does it, and why.
LATE = {
    "__init__": ("api", "it imports torch, which `import rear_scale` does without"),
    "__main__": ("cli", "it imports torch, and the list of commands is to be there at once"),
    "optim.adamw": ("optim.deepspeed_adam", "it imports DeepSpeed, which other optimizers do without"),
    "run.requeue": ("checkpoint.open", "it imports torch, and the answer is to be there within a second"),
    "scaling.command": ("scaling.measure scaling.simulate", "a plan on paper needs no engines"),
}


@cache
def imports_of(name: str) -> tuple[set[str], set[str], set[str]]:
    """Modules of rear_scale that a module imports, and those of them that it imports inside a function, or for type checkers."""
    tree = ast.parse(MODULES[name].read_text())
    everywhere, late, typed = set(), set(), set()
    checks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types = {id(node) for check in checks for node in ast.walk(check)}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        imported = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            whole = [f"{node.module}.{item.name}" for item in node.names]
            imported = [one if one.removeprefix("rear_scale.") in MODULES else str(node.module) for one in whole]
        elif isinstance(node, ast.Import):
            imported = [item.name for item in node.names]
        ours = {one.removeprefix("rear_scale.") for one in imported if one.startswith("rear_scale.")}
        everywhere |= ours
        late |= ours if id(node) in inside else set()
        typed |= ours if id(node) in for_types else set()
    return everywhere, late, typed


def test_the_import_order_is_that_of_the_map_and_complete() -> None:
    order = import_order()
    shown = (ROOT / "docs/architecture.md").read_text().split("## Map of the code")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in shown.splitlines() if line.startswith("| `rear_scale")]
    assert [name for row in rows for name in re.findall(r"`rear_scale/(\w+)", row)] == order
    assert {name.partition(".")[0] for name in MODULES} - {"__init__"} == {*order}


@pytest.mark.parametrize("name", import_order())
def test_a_folder_imports_only_what_stands_before_it(name: str) -> None:
    order = import_order()
    for module in MODULES:
        if module.partition(".")[0] == name:
            for imported in imports_of(module)[0] - {FACTS}:
                assert imported.partition(".")[0] in order[: order.index(name) + 1], f"{module} imports {imported}"


def test_the_facts_of_strategies_import_nothing_and_engines_nothing_of_the_model() -> None:
    everywhere, _, typed = imports_of(FACTS)
    assert everywhere == typed
    for row in facts.rows():
        for module in (row.engine.split(":")[0], row.formulas):
            imported = imports_of(module.removeprefix("rear_scale."))[0]
            assert not [one for one in imported if one.partition(".")[0] == "model"], module


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {}
    for name in MODULES:
        everywhere, _, typed = imports_of(name)
        imported = everywhere - typed
        # Importing a.b runs a/__init__.py first, which counts for modules outside of a.
        packages = {one.rpartition(".")[0] for one in imported if "." in one}
        graph[name] = imported | {one for one in packages if not name.startswith(one)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_imports_inside_functions_have_a_reason() -> None:
    found = {name: " ".join(sorted(late)) for name in MODULES if (late := imports_of(name)[1])}
    assert found == {name: imported for name, (imported, _) in LATE.items()}


def test_a_strategy_is_named_by_its_section_and_read_as_its_row() -> None:
    """Whatever depends on the strategy reads parallel/facts.py; the key itself is written once."""
    named = {
        str(path.relative_to(ROOT))
        for folder in ("rear_scale", "launchers")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"strategy\.name|strategy_name", path.read_text())
    }
    assert named == {"rear_scale/config/schema.py"}


def test_the_table_of_strategies_is_that_of_their_facts() -> None:
    lines = ["| `strategy=` | engine | shards | ranks | compiles | fp8 | Muon | `cpu_offload` | `--simulate` |"]
    default = config.load("rear_xl.yaml").strategy.name
    for row in facts.rows():
        shards = ", ".join(row.shards) + (", in each of `strategy.replicas` groups of ranks" if row.replicates else "")
        ranks = "1" if row.alone else "any number" if row.fewest_ranks == 1 else f"{row.fewest_ranks} and more"
        features = (
            row.no_compile is None, row.no_fp8 is None, row.no_whole_matrices is None, row.offloads, row.simulated
        )  # fmt: skip
        marks = " | ".join("yes" if has else "-" for has in features)
        name = f"`{row.name}`{' (default)' if row.name == default else ''}"
        lines.append(f"| {name} | {row.title} | {shards or 'nothing'} | {ranks} | {marks} |")
    text = (ROOT / "docs/training.md").read_text()
    for line in lines:
        assert line in text, line


def test_the_walk_names_functions_and_classes_that_are_there() -> None:
    walk = (ROOT / "docs/architecture.md").read_text().split("## One batch of training")[1].split("\n## Rules")[0]
    stages = re.findall(r"`(rear_scale/[\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", walk)
    assert len(stages) > 25
    for file, names in stages:
        source = (ROOT / file).read_text()
        for name in re.findall(r"\w+", names):
            assert re.search(rf"(?:def|class) {name}\b", source), f"{file}: {name}"


def test_engines_are_imported_where_they_belong() -> None:
    for engine, homes in (
        ("deepspeed", ["optim/deepspeed_adam.py", "parallel/deepspeed.py"]),
        ("wandb", ["run/wandb.py"]),
        ("torch.utils.tensorboard", ["run/tensorboard.py"]),
    ):
        importers = [
            str(path.relative_to(ROOT / "rear_scale"))
            for path in (ROOT / "rear_scale").rglob("*.py")
            if re.search(rf"^\s*(?:import|from) {engine}\b", path.read_text(), re.MULTILINE)
        ]
        assert sorted(importers) == homes
    for folder in ("model", "objective"):
        for path in (ROOT / "rear_scale" / folder).rglob("*.py"):
            assert "torch.distributed" not in path.read_text()
