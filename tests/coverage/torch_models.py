"""The model classes of PyTorch's own quantization tests, and what each is built and called with."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn


pytest.importorskip("expecttest", reason="torch.testing needs expecttest, which is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what is deprecated in there
    from torch.testing._internal import common_quantization


#: Makes the inputs of a batch.
Inputs = Callable[[int], tuple[Any, ...]]


def floats(*shapes: tuple[int, ...]) -> Inputs:
    """One random tensor for each shape, which says nothing of the batch; the same ones at every call."""

    def make(batch: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(batch)
        return tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes)

    return make


def tokens(*shape: int) -> Inputs:
    """Indices from 0 to 9."""
    return lambda batch: (torch.arange(batch * max(1, torch.Size(shape).numel())).view(batch, *shape) % 10,)


def bags(batch: int) -> tuple[Tensor, Tensor]:
    """Indices, and where each bag begins, (2 N,) and (N,): the last bag has all, so that any part of both is valid."""
    return torch.arange(2 * batch) % 10, torch.zeros(batch, dtype=torch.long)


@dataclass(frozen=True)
class TorchCase:
    """A class, what makes a model of it, and what goes into that.

    Attributes:
        name: of the class in `common_quantization`, with a dot where it stands in another one.
        inputs: makes a batch.
        arguments: of the class.
    """

    name: str
    inputs: Inputs
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The class, and what it is made with."""
        values = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.name}({values})"

    def make(self) -> nn.Module:
        """A model with weights that are always the same; its batch norms have seen data."""
        torch.manual_seed(0)
        model: nn.Module = found()[self.name](**self.arguments)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        return model


def found() -> dict[str, type[nn.Module]]:
    """The model classes that the installed PyTorch has there, by name."""
    places = {"": common_quantization, "TestHelperModules.": common_quantization.TestHelperModules}
    classes = {prefix + name: value for prefix, place in places.items() for name, value in vars(place).items()}
    return {
        name: value
        for name, value in classes.items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == common_quantization.__name__
    }


IMAGES, LARGE_IMAGES, VECTORS = floats((3, 5, 5)), floats((3, 16, 16)), floats((5,))

#: Those that take images of 3 by 5 by 5, or of 3 by 16 by 16.
OF_IMAGES = (
    "ConvModel ConvTransposeModel ConvBnModel AnnotatedConvBnModel ConvBnReLUModel AnnotatedConvBnReLUModel "
    "TwoLayerConvModel ConvReluModel ConvReluConvModel ConvReluAddModel FunctionalConv2d "
    "SingleLayerFunctionalConvModel TwoLayerFunctionalConvModel FunctionalConvReluModel FunctionalConvReluConvModel "
    "ConvBNReLU TestHelperModules.Conv2dPropAnnotaton TestHelperModules.Conv2dWithObsSharingOps "
    "TestHelperModules.Conv2dWithTwoLinearPermute TestHelperModules.ConvLinearWPermute "
    "TestHelperModules.ConvWithAdaptiveAvgPool2d TestHelperModules.ConvBnReLU2dAndLinearReLU "
    "TestHelperModules.Conv2dThenConv1d"
).split()
OF_LARGE_IMAGES = (
    "ModelForFusionWithBias ResNetBase ModelMultipleOps ModelMultipleOpsNoAvgPool TestHelperModules.Conv2dWithSplit"
).split()

#: Those that take vectors of 5.
OF_VECTORS = (
    "SingleLayerLinearModel AnnotatedSingleLayerLinearModel SingleLayerLinearDynamicModel LinearAddModel "
    "TwoLayerLinearModel LinearModelWithSubmodule AnnotatedTwoLayerLinearModel ActivationsTestModel LinearReluModel "
    "LinearReluLinearModel LinearReluAddModel LinearBnLeakyReluModel LinearTanhModel NormalizationTestModel "
    "NestedModel AnnotatedSubNestedModel AnnotatedCustomConfigNestedModel QuantSubModel InnerModule FunctionalLinear "
    "SingleLayerFunctionalLinearModel TwoLayerFunctionalLinearModel FunctionalLinearAddModel "
    "FunctionalLinearReluModel FunctionalLinearReluLinearModel SkipQuantModel QuantStubModel "
    "ManualLinearDynamicQATModel TestHelperModules.LinearReluModel TestHelperModules.AddMulScalar"
).split()

ENGINE = {"qengine": "fbgemm"}

CASES = [
    *(TorchCase(name, IMAGES) for name in OF_IMAGES),
    *(TorchCase(name, LARGE_IMAGES) for name in OF_LARGE_IMAGES),
    *(TorchCase(name, VECTORS) for name in OF_VECTORS),
    *(TorchCase(name, IMAGES, ENGINE) for name in ("AnnotatedConvModel", "AnnotatedConvTransposeModel")),
    *(
        TorchCase(name, VECTORS, ENGINE)
        for name in (
            "AnnotatedNestedModel",
            "AnnotatedSkipQuantModel",
            "ManualLinearQATModel",
            "ManualDropoutQATModel",
        )
    ),
    TorchCase("LinearBnLeakyReluModel", VECTORS, {"with_bn": False}),
    *(
        TorchCase(
            "ConvBnAddReluModel",
            floats((5, 3, 3), (5, 2, 2)),
            dict(zip(("with_bn", "with_relu", "left_conv", "two_conv", "use_torch_add"), values, strict=True)),
        )
        for values in (
            (True, True, True, True, True),
            (False, True, True, True, True),
            (True, False, True, True, False),
            (True, True, False, True, False),
        )
    ),
    *(
        TorchCase(
            "ConvBnAddReluModel",
            floats((5, 3, 3), (5, 2, 2) if left else (5, 2, 2)),
            {"two_conv": False, "left_conv": left},
        )
        for left in (True, False)
    ),
    *(TorchCase("RNNDynamicModel", floats((3, 2)), {"mod_type": kind}) for kind in ("GRU", "LSTM")),
    *(
        TorchCase("RNNCellDynamicModel", floats((2,)), {"mod_type": kind})
        for kind in ("GRUCell", "LSTMCell", "RNNReLU", "RNNTanh")
    ),
    TorchCase(
        "LSTMwithHiddenDynamicModel",
        lambda batch: (floats((3, 2))(batch)[0], (torch.zeros(1, 3, 2), torch.zeros(1, 3, 2))),
    ),
    *(TorchCase(name, floats((3, 10, 10))) for name in ("ManualConvLinearQATModel", "ManualConvLinearSymmQATModel")),
    TorchCase("ManualEmbeddingBagLinear", tokens(3)),
    TorchCase("DeFusedEmbeddingBagLinear", tokens(3)),
    *(TorchCase(name, floats((2, 6, 6))) for name in ("SubModelForFusion", "SubModelWithoutFusion")),
    TorchCase("ModelForFusion", floats((3, 1, 19)), {"qconfig": None}),
    TorchCase("ModelWithSequentialFusion", floats((3, 10, 10))),
    TorchCase("ModelForLinearBNFusion", floats((20,))),
    TorchCase("DummyObserver", VECTORS),
    TorchCase("ModelForConvTransposeBNFusion", floats((3, 8))),
    TorchCase("ModelWithFunctionals", VECTORS),
    TorchCase(
        "EmbeddingBagModule",
        lambda batch: (torch.arange(2 * batch) % 10, 2 * torch.arange(batch + 1), torch.linspace(0.5, 1.5, 2 * batch)),
    ),
    TorchCase("EmbeddingModule", tokens()),
    TorchCase("EmbeddingWithStaticLinear", lambda batch: (*bags(batch), *floats((4,))(batch))),
    TorchCase(
        "DenseTopMLP",
        floats((5,), (4,)),
        {"dense_dim": 4, "dense_out": 2, "embedding_dim": 5, "top_out_in": 2, "top_out_out": 2},
    ),
    TorchCase("EmbBagWrapper", bags, {"num_embeddings": 10, "embedding_dim": 5}),
    TorchCase("SparseNNModel", lambda batch: (*bags(batch), *floats((4,))(batch))),
    TorchCase(
        "TestHelperModules.ControlFlow",
        lambda batch: (torch.ones(batch, 2), torch.tensor([False]), torch.tensor([False]), torch.ones(2, 2)),
    ),
    TorchCase("TestHelperModules.Conv2dWithTwoLinear", floats((3, 4, 10))),
    TorchCase("TestHelperModules.TwoLinearModule", floats((8,))),
    TorchCase("TestHelperModules.ConvMaxPool2d", floats((2, 6, 6))),
    *(
        TorchCase(
            "TestHelperModules.ConvWithBNRelu",
            floats((3, *[6] * dim)),
            {"relu": relu, "dim": dim, "bn": bn, "bias": bias},
        )
        for dim in (1, 2, 3)
        for relu in (True, False)
        for bn in (True, False)
        for bias in (True, False)
    ),
    *(
        TorchCase(
            "TestHelperModules.ConvTWithBNRelu",
            floats((3, *[6] * dim)),
            {"relu": relu, "dim": dim, "bn": bn, "bias": bias},
        )
        for dim in (1, 2)
        for relu in (True, False)
        for bn in (True, False)
        for bias in (True, False)
    ),
    TorchCase("TestHelperModules.Conv2dWithCat", floats((3, 5, 5), (3, 5, 5))),
    TorchCase("TestHelperModules.Conv2dWithTwoCat", floats((3, 5, 5), (3, 5, 5), (6, 3, 3), (6, 3, 3))),
    TorchCase("TestHelperModules.ThreeAdd", floats((5,), (5,), (5,), (5,))),
    TorchCase("TestHelperModules.EmbeddingModule", tokens(3)),
    TorchCase("TestHelperModules.EmbeddingConvLinearModule", tokens(5)),
    TorchCase("TestHelperModules.AddInplaceAdd", floats((5,), (5,))),
    TorchCase("TestHelperModules.MulInplaceMul", floats((5,), (5,))),
    TorchCase("TestHelperModules.GroupwiseConv2d", floats((4, 10, 10))),
]
