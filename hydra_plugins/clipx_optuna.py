"""``hydra/sweeper=optuna``.

Hydra finds plugins only in this namespace package and imports it at every start, so slow imports wait for a search.
"""

import importlib.util
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from clipx.errors import UserError


class OptunaSweeper(Sweeper):
    """A sweep whose jobs Optuna proposes; conf/hydra/sweeper/optuna.yaml explains its keys."""

    def __init__(self, **settings: Any):
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.loader = config, hydra_context.config_loader
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise UserError('hydra/sweeper=optuna needs Optuna; pip install "clipx[optuna]"')
        from clipx.config.tune import tune

        tune(self.settings, self.config, list(arguments), self.launcher, self.loader)
