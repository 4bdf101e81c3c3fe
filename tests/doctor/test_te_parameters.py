"""The table of TransformerEngine's parameters is held to a package, here to one that plays it."""

from types import SimpleNamespace

import torch

from dapo_megatron.doctor.te_parameters import differences
from tests.planning import te_stand_in

CPU = torch.device("cpu")
KINDS = ("LayerNormLinear", "Linear", "RMSNorm", "DotProductAttention")


def package(**changed: type) -> SimpleNamespace:
    """The stand-in's modules, some of them changed; not installed, since other tests must not find it."""
    return SimpleNamespace(**{kind: getattr(te_stand_in, kind) for kind in KINDS} | changed)


class Renamed(te_stand_in.LayerNormLinear):
    """A later version that calls the norm otherwise."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.norm_weight = self._parameters.pop("layer_norm_weight")


class Whole(te_stand_in.Linear):
    """One that does not cut its weight."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options | {"tp_size": 1})


class Unmarked(te_stand_in.Linear):
    """One that does not say how its weight is cut, so that norms would count one shard."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        del self.weight.tensor_model_parallel


class Apart(te_stand_in.RMSNorm):
    """A norm whose gradient no rank would sum."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options | {"sequence_parallel": False})


class Learned(te_stand_in.DotProductAttention):
    """Attention with a parameter."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__()
        self.sink = torch.nn.Parameter(torch.zeros(3))


def test_a_package_that_has_the_tables_parameters():
    assert differences(package(), CPU) == []


def test_another_package_is_told_apart():
    renamed = differences(package(LayerNormLinear=Renamed), CPU)
    assert len(renamed) == 2 and "norm_weight [96]" in renamed[0] and "with bias" in renamed[1]
    whole = differences(package(Linear=Whole), CPU)
    cut = "the table weight [320, 48], cut along 1"
    assert whole[0] == f"Linear, row-parallel: has weight [320, 96], cut along 1, {cut}"
    assert differences(package(Linear=Unmarked), CPU)[0].endswith(f"has weight [320, 48], not marked, {cut}")
    assert differences(package(RMSNorm=Apart), CPU)[0].startswith("RMSNorm: has weight [96], not marked, the table")
    learned = differences(package(DotProductAttention=Learned), CPU)
    assert learned == ["DotProductAttention: has sink [3], not marked, the table no parameters"]
