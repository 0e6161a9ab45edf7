"""Which module may import which: each has a level, and there are no cycles."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# modules import from their own level and below; a folder with several levels has a line for each
LEVELS = {
    "errors duration preprocessing": 0,
    "distributed distributed.signals distributed.watchdog": 1,
    "devices": 1,
    "config.console config.instantiate config.validate config.meaning config.runs config.schema": 1,
    "models.clip models.hf models.kernels models.layers models.lora models.numerics models.packed models.resnet": 2,
    "models.text models.timm models.tower models.vision": 2,
    "loss loss.contrastive loss.distill loss.relations loss.sigmoid loss.tiles muon optim sched tokenizer": 2,
    "data.draw_captions data.origin data.plan data.sample data.files data.captions data.tar.headers data.tar.index": 2,
    "data.remote.cache data.remote.prefetch data.remote.sets data.remote.sizes data.remote.stores": 2.1,
    "data.catalogue data.class_names data.faults data.features data.folder data.handles": 2.2,
    "data.augment data.images data.mix data.pixels data.shard_paths data.shards data.teacher": 2.2,
    "data.class_shards data.dummy data.emoji data.labelled data.loader data.readers": 2.3,
    "data.prepare.caption_rules data.prepare.cells data.prepare.choice data.prepare.claim": 2.4,
    "data.prepare.download data.prepare.encode data.prepare.folder_layout": 2.4,
    "data.prepare.layouts data.prepare.members data.prepare.pack data.prepare.pictures": 2.4,
    "data.prepare.processes data.prepare.reshard data.prepare.shard": 2.4,
    "data.prepare.report data.prepare.rows data.prepare.tables data.prepare.verify": 2.4,
    "weights.archive weights.checkpoint weights.convert weights.export weights.foreign": 3,
    "weights.load weights.mix weights.peek weights.positions weights.pretrained": 3,
    "evals.encoder evals.features evals.figures evals.linear_probe evals.naming evals.retrieval": 4,
    "evals.validation evals.zero_shot": 4,
    "track track.csv track.tensorboard track.wandb": 4,
    "training.average training.batch training.callbacks training.compile training.direction": 5,
    "training.existing_run training.final_report training.frozen training.header training.health training.lock": 5,
    "training.logs training.loop": 5,
    "training.memory training.parts training.reading training.resume training.run": 5,
    "training.step training.summary training.teacher": 5,
    "tools.ablation tools.bench tools.benchmark tools.curation tools.curves tools.embeddings": 6,
    "tools.findings tools.index tools.left_out": 6,
    "tools.machine tools.measure tools.predictions tools.runs_table tools.score tools.score_table": 6,
    "config.arguments config.cli config.explain config.help config.hydra_settings": 6,
    "config.mistyped config.resolve config.study config.sweep config.tune": 6,
    "train prepare check evaluate embed predict export compare bench": 7,
}
LEVEL = {module: level for modules, level in LEVELS.items() for module in modules.split()}
HYDRA = {"hydra", "omegaconf"}
CONFIG = {module for module in LEVEL if module.startswith("config.") or LEVEL[module] == 7}


@cache
def modules() -> dict[str, Path]:
    """Path of each module, by its name below clipx, except packages whose __init__ is only a docstring."""
    modules_by_name = {
        ".".join(path.relative_to(ROOT / "clipx").with_suffix("").parts): path
        for path in (ROOT / "clipx").rglob("*.py")
    }
    named = {name.removesuffix(".__init__"): path for name, path in modules_by_name.items() if name != "__init__"}
    return {name: path for name, path in named.items() if path.stem != "__init__" or name in LEVEL}


def imports(path: Path) -> Iterator[str]:
    """The full names that a file imports, including inside functions, but not under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    type_checking_blocks = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    skipped = {id(inner) for node in type_checking_blocks for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def graph() -> dict[str, set[str]]:
    """The modules of clipx that each module imports."""
    imported: dict[str, set[str]] = {}
    for module, path in modules().items():
        names = [name.removeprefix("clipx.") for name in imports(path) if name.startswith("clipx.")]
        targets = (name if name in LEVEL else name.rpartition(".")[0] for name in names)
        imported[module] = {home for home in targets if home in LEVEL} - {module}
    return imported


def test_every_module_has_a_level() -> None:
    assert set(modules()) == set(LEVEL)


@pytest.mark.parametrize("module", sorted(LEVEL))
def test_imports_go_downward(module: str) -> None:
    higher = {other for other in graph()[module] if LEVEL[other] > LEVEL[module]}
    assert not higher, f"{module} (level {LEVEL[module]}) imports {', '.join(sorted(higher))}, which is higher"


def test_no_modules_import_each_other() -> None:
    TopologicalSorter(graph()).prepare()  # raises CycleError with the cycle


def test_no_folders_import_each_other() -> None:
    folders: dict[str, set[str]] = {}
    for module, others in graph().items():
        if "." in module and module not in CONFIG:
            folder = module.partition(".")[0]
            folders.setdefault(folder, set()).update(
                other.partition(".")[0] for other in others if "." in other and other not in CONFIG
            )
            folders[folder] -= {folder}
    TopologicalSorter(folders).prepare()


@pytest.mark.parametrize("module", sorted(set(LEVEL) - CONFIG))
def test_only_config_and_the_commands_know_hydra(module: str) -> None:
    assert not HYDRA & {name.partition(".")[0] for name in imports(modules()[module])}
