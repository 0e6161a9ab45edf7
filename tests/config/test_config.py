import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from inspect import signature
from pathlib import Path

import hydra
import pytest
import torch
import yaml
from conftest import FEW, ROOT, run_python
from hydra.core.override_parser.overrides_parser import OverridesParser

from clipx.config import arguments
from clipx.config.instantiate import build, locate
from clipx.config.meaning import differences
from clipx.config.resolve import resolve
from clipx.config.schema import ExportConfig, TrainConfig
from clipx.data.sample import Data
from clipx.models.text import TextEncoder
from clipx.models.vision import ImageEncoder

GROUPS = ("model", "data", "augment", "optim", "sched", "loss", "evals", "track", "experiment")
MODELS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))
REQUIRED = {
    "data=folder": ["data.root=DIR"],
    "data=shards": ["data.root=DIR"],
    "model=hf_text": ["model.text.name=DIR"],
    "optim=any": ["optim.optimizer=torch.optim.RAdam", "optim.lr=1e-3"],
}


def every_option() -> list[str]:
    return sorted(f"{group}={path.stem}" for group in GROUPS for path in (ROOT / "conf" / group).glob("*.yaml"))


def compose_config(*overrides: str) -> TrainConfig:
    with hydra.initialize_config_module("clipx.conf", version_base="1.3"):
        return resolve(hydra.compose("train", list(overrides)), TrainConfig)


@pytest.mark.parametrize("option", every_option())
def test_every_option_of_every_group_composes_and_fits_what_it_calls(option: str) -> None:
    group, _, name = option.partition("=")
    override = f"{group}=[{name}]" if group in ("evals", "track") else option
    assert compose_config(override, *REQUIRED.get(option, []))


@pytest.mark.parametrize(
    "option", [option for option in every_option() if option.startswith("model=") and option not in REQUIRED]
)
def test_every_model_builds(option: str) -> None:
    config = compose_config(option)
    with torch.device("meta"):
        assert build(config.model).visual.size == config.model["image"]["size"] or config.model["image"]["size"] is None


def test_every_experiment_opens_with_its_command() -> None:
    for path in (ROOT / "conf" / "experiment").glob("*.yaml"):
        first, *rest = path.read_text().splitlines()
        assert first == "# @package _global_"
        assert any(f"python -m clipx.train experiment={path.stem}" in line for line in rest if line.startswith("#"))


def test_the_defaults_of_the_encoders_are_those_of_vit_b32() -> None:
    node = compose_config("model=vit_b32").model
    for part, target in (("image", ImageEncoder), ("text", TextEncoder)):
        defaults = {key: parameter.default for key, parameter in signature(target).parameters.items()}
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in node[part].items()}
        assert given == {"_target_": f"{target.__module__}.{target.__name__}", **defaults}


def base_options(*groups: str) -> list[str]:
    """Options that do not extend another option, and call something."""
    files = [path for group in groups for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]
    texts = {f"{path.parent.name}={path.stem}": path.read_text() for path in files}
    return [option for option, text in texts.items() if "defaults:" not in text and "_target_:" in text]


@pytest.mark.parametrize("option", base_options("data", "augment", "optim", "sched"))
def test_the_yaml_of_a_group_restates_the_defaults_of_what_it_calls(option: str) -> None:
    group = option.split("=")[0]
    node = getattr(compose_config(option, *REQUIRED.get(option, [])), group)
    parameters = signature(locate(node["_target_"], group)).parameters
    defaults = {
        key: parameter.default
        for key, parameter in parameters.items()
        if parameter.default is not parameter.empty and key != "root"
    }
    if group == "data":
        defaults |= {field.name: field.default for field in fields(Data) if field.default is not MISSING}
    assert defaults == {key: tuple(node[key]) if isinstance(node[key], list) else node[key] for key in defaults}


def test_export_yaml_states_every_key_of_the_schema() -> None:
    keys = set(yaml.safe_load((ROOT / "conf/export.yaml").read_text())) - {"hydra"}
    assert keys == {field.name for field in fields(ExportConfig)} - {"choices", "varied"}


def test_train_yaml_states_every_key_of_the_schema() -> None:
    keys = set(yaml.safe_load((ROOT / "conf/train.yaml").read_text())) - {"defaults", "hydra"}
    assert keys - {"evals", "track"} == {field.name for field in fields(TrainConfig)} - {*GROUPS, "choices", "varied"}


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["optim.lr=fast"], "optim.lr='fast': should be a valid number, unable to parse string as a number"),
        (["optim.lrr=1"], "optim.lrr: there is no such key; did you mean optim.lr?"),
        (["max_step=5"], "max_step: there is no such key; did you mean max_steps?"),
        (["model=smal"], "model=smal: there is no such option; did you mean small?"),
        (["evals=[retrival]"], "evals=retrival: there is no such option; did you mean retrieval?"),
        (["modle=tiny"], "modle: there is no such key; did you mean model?"),
        (["+model.text.dept=3"], "model.text.dept: TextEncoder has no such argument; did you mean model.text.depth?"),
        (["model.image.heads=5"], "model.image.heads=5 does not divide width=192"),
        (["model.image.heads=0"], "model.image.heads=0: should be greater than 0"),
        (["model.text.context=-1"], "model.text.context=-1: should be greater than 0"),
        (["model.text.embed=64"], "model.text.embed=64: should be 192 as image.embed; the towers share one space"),
        (["batch_size=0"], "batch_size=0: should be greater than 0"),
        (["workers=-1"], "workers=-1: should be 'auto' or greater than or equal to 0"),
        (
            ["grad_checkpoint=vision"],
            "grad_checkpoint='vision': should be a valid boolean, unable to interpret input or 'image' or 'text'",
        ),
        (["batch_size=2.5"], "batch_size=2.5: should be a valid integer, got a number with a fractional part"),
        (["data.crop=[0.5]"], "data.crop=[0.5]: should have 2 values"),
        (["amp=bf17"], "amp='bf17': should be 'none', 'bf16', 'fp16' or 'auto'"),
        (["matmul_precision=medium"], "matmul_precision='medium': should be 'highest' or 'high'"),
        (["deterministic=perhaps"], "deterministic='perhaps': should be a valid boolean, unable to interpret input"),
        (["data=folder"], "data.root has no value; add data.root=..."),
        (
            ["sched=null"],
            "sched=null: there is no such option; there are constant, warmup_constant_cooldown, warmup_cosine, "
            "warmup_linear",
        ),
        (["~sched"], "sched has no value; add sched=..."),
        (
            ["model.bias=-5"],
            "model.bias=-5.0 has no effect with the loss clipx.loss.clip_loss; add loss=sigmoid, or model.bias=null",
        ),
        (
            ["loss=sigmoid", "model.bias=null"],
            "the loss clipx.loss.sigmoid_loss needs a bias of the logits; add model.bias=-10",
        ),
        (["model.temperature=2"], "model.temperature=2.0 is not in temperature_range=[0.01, 1.0]"),
        (
            ["model.temperature_range=[1,0.1]"],
            "model.temperature_range=[1, 0.1]: expected the lowest and the highest temperature, above 0",
        ),
        (
            ["~sched._target_"],
            "sched={'_partial_': True, 'warmup': 2000, 'warmup_cap': 0.1, 'floor': 0.0}: expected a config node with a "
            "_target_",
        ),
        (["optim._target_=os.x"], "optim._target_=os.x is not clipx's own code; trust=[os] allows it to be called"),
        (["model=5"], "model=5: there is no such option; there are " + ", ".join(MODELS)),
        (
            ["config=no.yaml", "model=tiny"],
            "config=no.yaml: there is no such file; a run keeps its own as outputs/NAME/config.yaml",
        ),
        (["config=no.yaml"], "config=no.yaml: there is no such file; a run keeps its own as outputs/NAME/config.yaml"),
        (["seed=${sed}"], "seed: Interpolation key 'sed' not found"),
    ],
)
def test_a_mistake_ends_in_one_line_before_anything_is_built(
    args: list[str], line: str, fails: Callable[..., str], tmp_path: Path
) -> None:
    assert fails(*args) == line
    assert not list(tmp_path.iterdir())


def test_a_wrong_duration_is_refused_with_the_right_form(fails: Callable[..., str]) -> None:
    assert fails("save_every=3parsecs").startswith("save_every='3parsecs': should be a duration above 0: steps (500),")


def test_a_mistake_costs_no_traceback_and_exit_code_1(tmp_path: Path) -> None:
    result = run_python("-m", "clipx.train", "optim.lr=fast", cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == "optim.lr='fast': should be a valid number, unable to parse string as a number\n"


ODD = [
    "/a=b/c",
    "/with space/x",
    "~/x",
    "/été/ñ",
    "{0..3}",
    "/x-{000..012}.tar",
    "a,b",
    "it's",
    "(x",
    "[y",
    "http://h/p?q=1&r=2",
    "back\\slash'quote",
    "ends\\",
    "$5",
    "导盲犬",
    "a:b",
    "#x",
    "%20",
    "glob(*)",
    "choice(1,2)",
]


@pytest.mark.parametrize("value", ODD)
def test_odd_values_are_taken_as_they_are_written(value: str) -> None:
    argument = arguments.escape_override(f"data.root={value}", sweep=False)
    override = OverridesParser.create().parse_override(argument)
    assert override.value() == value and not override.is_sweep_override()


@pytest.mark.parametrize("argument", ["evals=[a,b]", "x=null", "x=3", "x={a:1}", "x=${y}", "~x", "+x=1", "x='a b'"])
def test_what_hydra_parses_is_unchanged(argument: str) -> None:
    assert arguments.escape_override(argument, sweep=False) == argument


def test_in_a_sweep_a_comma_parts_values_and_each_is_quoted_where_it_must_be() -> None:
    assert arguments.escape_override("optim.lr=1e-4,5e-4", sweep=True) == "optim.lr=1e-4,5e-4"
    assert arguments.escape_override("data.root=/a=b,/c", sweep=True) == "data.root='/a=b',/c"


@pytest.mark.parametrize("sweep", [False, True])
def test_in_a_list_each_value_is_quoted_where_it_must_be(sweep: bool) -> None:
    argument = arguments.escape_override("data.shards=[s/{00000..00001}.tar,b/{x,y}.tar,c.tar]", sweep)
    override = OverridesParser.create().parse_override(argument)
    assert override.value() == ["s/{00000..00001}.tar", "b/{x,y}.tar", "c.tar"] and not override.is_sweep_override()


def test_the_value_of_an_option_is_no_override() -> None:
    assert arguments.split_options(["seed=1", "--config-dir", "/a=b"]) == (["--config-dir", "/a=b"], ["seed=1"])


def test_odd_paths_reach_the_data(fails: Callable[..., str]) -> None:
    for path in ("/no/été=x~{a,b} c", "it's,here"):
        assert fails("data=shards", f"data.root={path}").startswith(f"data.root={path} is not a directory")


def test_the_same_arguments_give_the_same_directory() -> None:
    def directory(*overrides: str, **where: object) -> str:
        return str(arguments.run_directory(list(overrides), where.pop("name", None), where.pop("swept", None), **where))

    assert directory("optim.lr=1e-4", "model=tiny") == "outputs/model=tiny,optim.lr=1e-4"
    assert directory("model=tiny", "optim.lr=5e-4", "optim.lr=1e-4") == directory("optim.lr=1e-4", "model=tiny")
    assert directory("model=tiny", "data.root=/x", "workers=3", "stop_at=5", "log_every=1") == "outputs/model=tiny"
    assert directory() == "outputs/default"
    assert directory("seed=1", name="mine") == "outputs/mine"
    assert directory("seed=1", "optim.lr=1", swept=["seed"]) == "outputs/sweeps/sweep/optim.lr=1,seed=1"
    assert directory("seed=1", "optim.lr=1", swept=["seed"], name="s") == "outputs/sweeps/s/seed=1"
    assert directory("seed=1", saved=Path("outputs/x/config.yaml")) == "outputs/x,seed=1"


def test_a_directory_name_is_bounded_and_distinct() -> None:
    names = {arguments.directory_name([f"model.very_long_key_{i}={'x' * 99}" for i in range(n)]) for n in (2, 3, 4)}
    assert len(names) == 3 and max(map(len, names)) < 140
    a, b = arguments.directory_name(["data.val=/x/y"]), arguments.directory_name(["data.val=/x_y"])
    assert a != b and "/" not in a + b


def test_the_meaning_of_a_run_leaves_out_where_and_how_closely_it_is_watched() -> None:
    base = asdict(compose_config("data=shards", "data.root=a"))
    other = asdict(compose_config("data=shards", "data.root=b", "workers=3", "name=x", "save_every=5", "stop_at=3"))
    assert differences(base, other) == {}
    assert differences(base, asdict(compose_config("data=coco", "data.root=a"))) == {}  # the same shards, by name
    changed = asdict(compose_config("data=shards", "data.root=a", "optim.lr=1", "model.image.width=384"))
    assert [*differences(base, changed).values()] == ["model.image.width: 192 -> 384", "optim.lr: 0.0005 -> 1.0"]


def test_the_composed_config_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    result = run_python("-m", "clipx.train", "--cfg", "job", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "batch_size: 256" in result.stdout


def test_users_options_and_code_come_from_a_directory(
    train: Callable[..., None], fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine" / "optim").mkdir(parents=True)
    (tmp_path / "mine" / "optim" / "sgd.yaml").write_text("_target_: my_optimizers.sgd\n_partial_: true\nlr: 0.1\n")
    (tmp_path / "my_optimizers.py").write_text(
        "import torch\n"
        "def sgd(model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:\n"
        "    groups = [{'params': list(model.parameters()), 'peak_lr': lr}]\n"
        "    return torch.optim.SGD(groups, lr=lr)\n"
    )
    args = ["--config-dir", str(tmp_path / "mine"), "optim=sgd", "experiment=smoke", "max_steps=2", "workers=0"]
    monkeypatch.syspath_prepend(str(tmp_path))
    assert fails(*args).startswith("optim._target_=my_optimizers.sgd is not clipx's own code; trust=[my_optimizers]")
    train(*args, "trust=[my_optimizers]", "name=mine")
    assert json.loads((tmp_path / "outputs/mine/summary.json").read_text())["state"] == "finished"


def test_importing_clipx_costs_nothing() -> None:
    code = "import sys, clipx; assert not {'torch', 'hydra', 'numpy'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("args", [["--cfg", "job", "model=small"], ["model=small", "--cfg", "job", "seed=1"]])
def test_options_may_come_anywhere_among_the_arguments(args: list[str], tmp_path: Path) -> None:
    result = run_python("-m", "clipx.train", *args, cwd=tmp_path)
    assert result.returncode == 0 and yaml.safe_load(result.stdout)["model"]["image"]["width"] == 384


def test_a_config_of_a_run_is_for_the_commands_that_are_about_one(
    train: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from clipx import bench, evaluate

    train(*FEW, "evals=[]", "max_steps=1", "name=x")
    args = ["config=outputs/x/config.yaml", "parts=[step]", "rounds=1", "steps=1", "json=found.json"]
    monkeypatch.setattr(sys, "argv", ["clipx.bench", *args])
    bench.main()
    assert json.loads((tmp_path / "found.json").read_text())["step"]
    monkeypatch.setattr(sys, "argv", ["clipx.evaluate", "config=outputs/x/config.yaml", "run=outputs/x"])
    with pytest.raises(SystemExit, match=r"^config=outputs/x/config\.yaml: clipx\.evaluate does not read a"):
        evaluate.main()
