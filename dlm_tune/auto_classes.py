"""`import dlm_tune` is enough for transformers' Auto classes, and costs nothing until they are used.

The classes of `dlm_tune.models` register themselves when they are imported, which takes seconds. Here that import
waits for the first `AutoConfig.from_pretrained`, through which every Auto class goes.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULE = "transformers.models.auto.configuration_auto"


def register_on_use() -> None:
    """Make the first use of an Auto class import `dlm_tune.models`, whether transformers is imported yet or not."""
    if _MODULE in sys.modules:
        _wait_for_use(sys.modules[_MODULE])
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Finds one module as the other finders do, and lets `_wait_for_use` have it once it is there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, whose loader calls `_wait_for_use` at the end; None for all other modules."""
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_wait(module: ModuleType) -> None:
                execute(module)
                _wait_for_use(module)

            spec.loader.exec_module = execute_and_wait  # type: ignore[method-assign]
        return spec


def _wait_for_use(module: ModuleType) -> None:
    auto_config = module.AutoConfig
    original = auto_config.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, *arguments: Any, **options: Any) -> Any:
        auto_config.from_pretrained = original
        importlib.import_module("dlm_tune.models")
        return cls.from_pretrained(*arguments, **options)

    from_pretrained.__doc__ = original.__func__.__doc__
    auto_config.from_pretrained = classmethod(from_pretrained)
