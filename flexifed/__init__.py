"""Personalised federated learning for clients with heterogeneous model architectures: FlexiFed, on Ray.

>>> import flexifed
>>> models = [flexifed.build_model(name, num_classes=10, width=0.1) for name in ("vgg11_bn", "vgg19_bn")]
>>> plan = flexifed.sharing_plan(models, scheme="max_common")
>>> new_states = flexifed.aggregate(plan, [model.state_dict() for model in models])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexifed.cells.trained import TrainedClients, load_clients
    from flexifed.core.aggregate import aggregate
    from flexifed.core.schemes import SharingPlan, sharing_plan
    from flexifed.core.signature import DeclaredLayer, signature
    from flexifed.errors import FlexifedError
    from flexifed.models import build_model

__version__ = "0.1.0"
__all__ = [
    "DeclaredLayer",
    "FlexifedError",
    "SharingPlan",
    "TrainedClients",
    "aggregate",
    "build_model",
    "load_clients",
    "sharing_plan",
    "signature",
]

_MODULE_OF = {
    "DeclaredLayer": "flexifed.core.signature",
    "FlexifedError": "flexifed.errors",
    "SharingPlan": "flexifed.core.schemes",
    "TrainedClients": "flexifed.cells.trained",
    "aggregate": "flexifed.core.aggregate",
    "build_model": "flexifed.models",
    "load_clients": "flexifed.cells.trained",
    "sharing_plan": "flexifed.core.schemes",
    "signature": "flexifed.core.signature",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that `--help` need not wait for torch."""
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'flexifed' has no attribute {name!r}")


def __dir__() -> list[str]:
    """All public names, including those not imported yet, for tab completion."""
    return sorted({*globals(), *__all__})
