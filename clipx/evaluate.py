"""``python -m clipx.evaluate``: runs or weights -> numbers."""

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig

from clipx.config.cli import command
from clipx.config.resolve import check_nodes, typed_values
from clipx.config.runs import check_exists, check_mix, expand_runs
from clipx.config.schema import EvaluateConfig
from clipx.errors import UserError
from clipx.tools.benchmark import BenchmarkSet, find_sets, give_sets
from clipx.tools.score_table import check_outs


def main() -> None:
    command("evaluate", evaluate)


def evaluate(composed: DictConfig, directory: Path) -> None:
    """Score one or several runs; the directory is for results of weights that are not a file (open_clip:NAME).

    Raises:
        UserError: a key, a run or the data is wrong, or the command was interrupted.
    """
    values = typed_values(composed, EvaluateConfig)
    runs = expand_runs(values["run"])
    for run in runs:
        check_exists("run", run)
    check_mix(values["mix"], "alphas", values["alphas"])
    if values["mix"] and len(runs) > 1:
        raise UserError(f"mix={values['mix']} mixes one run, but run names {len(runs)}: {', '.join(runs)}; give one")
    check_outs(values["out"])
    sets: Mapping[str, BenchmarkSet] = {}
    if values["sets"] is not None:
        sets = find_sets(values["sets"], values["sets_cache"])
        values["evals"] = give_sets(values["evals"], sets, values.get("data") is not None)
    config = check_nodes(values, EvaluateConfig)
    from clipx.models.numerics import numerics  # imports torch
    from clipx.tools.score import score

    try:
        with numerics(config.matmul_precision, config.deterministic):
            score(config, directory, sets)
    except KeyboardInterrupt:
        raise UserError("interrupted; the results of the runs scored so far are in their metrics.json") from None


if __name__ == "__main__":
    main()
