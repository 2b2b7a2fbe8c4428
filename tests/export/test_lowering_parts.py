"""Each rewrite on its own: it matches what it says, and the function stays as it was."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from carpool.bundle.manifest import Method, TensorSpec
from carpool_export.lowering import MethodToLower, lower, passes, private
from carpool_export.lowering.decompositions import DECOMPOSITIONS
from carpool_export.lowering.private import speed
from carpool_export.lowering.product import PRODUCT
from carpool_export.model import PACKED_ATTENTION
from carpool_export.runner import LoadedProgram

aten = torch.ops.aten


@pytest.mark.parametrize(("module", "name"), private.NAMES)
def test_private_name_is_where_it_was(module: str, name: str) -> None:
    """An upgrade that moves one fails here by name, before it fails inside an export."""
    reduce(getattr, name.split("."), importlib.import_module(module))


def test_librarys_mask_code_does_not_know_our_attention() -> None:
    """Else transformers would build masks of its own, which cannot be traced."""
    assert PACKED_ATTENTION not in ALL_MASK_ATTENTION_FUNCTIONS


def test_patches_are_undone_even_after_an_error() -> None:
    """Lowering leaves the libraries as it found them."""
    before = (
        speed.xnnpack_preprocess.XNNPACKPassManager,
        speed.fx_traceback.set_current_meta,
        torch.fx.config.do_not_emit_stack_traces,
        ExportedProgram.run_decompositions,
    )

    def fail_inside() -> None:
        with private.fast_lowering():
            assert speed.fx_traceback.set_current_meta is not before[1]
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert before == (
        speed.xnnpack_preprocess.XNNPACKPassManager,
        speed.fx_traceback.set_current_meta,
        torch.fx.config.do_not_emit_stack_traces,
        ExportedProgram.run_decompositions,
    )


def test_one_tensor_given_twice_is_refused() -> None:
    """The tracer would merge the two inputs, and the program would be wrong."""
    example = torch.ones(2, 3)
    method = MethodToLower(
        function=torch.add, example_inputs=(example, example), dynamic_shapes=(None, None)
    )
    with pytest.raises(ValueError, match=r"^sum: expected distinct example tensors, got one twice"):
        lower({"sum": method}, progress=lambda _: None)


def flat_program(
    function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False
) -> ExportedProgram:
    sizes = ({0: Dim("rows", min=2, max=9)},) if dynamic else None
    mode = "symbolic" if dynamic else "real"
    traced = make_fx(function, tracing_mode=mode)(*inputs)
    return torch.export.export(traced, inputs, dynamic_shapes=sizes)


def targets(program: ExportedProgram) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def transposed_twice(x: Tensor) -> Tensor:
    return aten.t(aten.t(x)) + 1.0


def transposed(x: Tensor) -> Tensor:
    return aten.t(x) + 1.0


def squeezed(x: Tensor) -> Tensor:
    return (x.unsqueeze(1) * 2.0).squeeze(1) + 1.0


def moved_twice(x: Tensor) -> Tensor:
    cube = (x * 2.0).view(2, 3, 4)
    return aten.clone(cube.transpose(0, 1)).permute(1, 2, 0) + 1.0


def copies(x: Tensor) -> Tensor:
    return aten.expand(aten.clone(aten.alias(x)), [4, 6]) + 1.0


def product(x: Tensor) -> Tensor:
    weight = x[:3]
    return torch.mm(x, weight.t()) + torch.addmm(weight[:, 0], x, weight.t())


def flattened_linear(x: Tensor) -> Tensor:
    cube = (x * 2.0).view(2, 2, 6)
    return functional.linear(cube.view(4, 6), x[:3]).view(2, 2, 3) * 1.0


def flattened_product(x: Tensor) -> Tensor:
    cube = (x * 2.0).view(2, 2, 6)
    return torch.mm(cube.view(4, 6), x.view(6, 4)).view(2, 2, 4) * 1.0


def heads(x: Tensor) -> tuple[Tensor, Tensor]:
    return (x * 2.0).view(2, 2, 3, 2), (x * 3.0).view(2, 2, 3, 2)


def attention(x: Tensor) -> Tensor:
    query, key = heads(x)
    merged = key.transpose(2, 3).reshape(4, 2, 3)
    return torch.bmm(query.reshape(4, 3, 2), merged).view(2, 2, 3, 3) * 1.0


def attention_backward(x: Tensor) -> Tensor:
    query, key = heads(x)
    merged = query.reshape(4, 3, 2).transpose(1, 2)
    return torch.bmm(merged, key.reshape(4, 3, 2)).view(2, 2, 2, 2) * 1.0


def views(x: Tensor) -> Tensor:
    return x.view(24).view(2, 12).view(2, 12) * 1.0


def repeated(x: Tensor) -> Tensor:
    return torch.exp(x) * torch.exp(x) * torch.exp(x * 2.0)


@pytest.mark.parametrize(
    ("rewrite", "function", "gone", "there"),
    [
        (passes.drop_identities, copies, [aten.alias.default, aten.expand.default], []),
        (passes.merge_transposes, transposed_twice, [aten.t.default], []),
        (passes.merge_transposes, transposed, [aten.t.default], [aten.permute.default]),
        (
            passes.name_views_alike,
            squeezed,
            [aten.unsqueeze.default, aten.squeeze.dim],
            [aten.view.default] * 2,
        ),
        (
            passes.merge_transposes,
            moved_twice,
            [aten.transpose.int, aten.clone.default],
            [aten.permute.default],
        ),
        (passes.products_before_view, flattened_product, [aten.mm.default], [PRODUCT]),
        (
            passes.batched_products,
            attention,
            [aten.bmm.default, aten.transpose.int],
            [PRODUCT],
        ),
        (
            passes.batched_products,
            attention_backward,
            [aten.bmm.default],
            [aten.transpose.int, PRODUCT],
        ),
        (
            passes.products_to_linear,
            product,
            [aten.mm.default, aten.addmm.default],
            [aten.linear.default] * 2,
        ),
        (passes.merge_views, views, [], [aten.view.default]),
        (passes.share_common_subexpressions, repeated, [], [aten.exp.default] * 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_pass_rewrites_and_keeps_the_function(
    rewrite: passes.Pass, function: Callable[[Tensor], Tensor], gone: list[Any], there: list[Any]
) -> None:
    """What must be gone is gone, what must remain remains that often, values are equal."""
    x = torch.arange(24.0).view(4, 6) / 10
    program = flat_program(function, x)
    if rewrite is not passes.name_views_alike:
        passes.name_views_alike(program.graph)
    assert rewrite(program.graph) > 0
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.graph_module.recompile()
    left = targets(program)
    assert not set(gone) & set(left)
    for target in set(there):
        assert left.count(target) == there.count(target)
    assert torch.equal(program.module()(x), function(x))


def test_a_product_that_was_not_merged_is_left_alone() -> None:
    """Of three dimensions: XNNPACK takes ``bmm`` as it is."""
    program = flat_program(
        lambda x: torch.bmm(x.view(2, 3, 4), x.view(2, 4, 3)).view(2, 9), torch.ones(4, 6)
    )
    assert passes.batched_products(program.graph) == 0


def products(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    query, key = x.view(-1, 2, 3, 4), (x * 2.0).view(-1, 2, 3, 4)
    logits = torch.matmul(query, key.transpose(2, 3))
    mixed = torch.matmul(logits.transpose(2, 3), query)
    return logits, torch.mm(mixed.reshape(-1, 4), weight).view(-1, 2, 3, 5)


def test_lowered_products_equal_eager(tmp_path: Path) -> None:
    """Both kernels, a transposed factor on either side, a batch known at run time."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 5, generator=generator)
    method = MethodToLower(
        function=products,
        example_inputs=(torch.ones(7, 24), torch.ones(4, 5)),
        dynamic_shapes=({0: Dim("batch", min=1, max=9)}, None),
    )
    program = tmp_path / "products.pte"
    program.write_bytes(lower({"products": method}, progress=lambda _: None))
    specs = [TensorSpec(name=name, dtype="float32", shape=(1,)) for name in ("x", "weight")]
    loaded = LoadedProgram(program, {"products": Method(bounds={}, inputs=specs, outputs=())})
    for batch in (1, 4, 9):
        x = torch.randn(batch, 24, generator=generator)
        for found, expected in zip(
            loaded.call("products", {"x": x, "weight": weight}), products(x, weight), strict=True
        ):
            torch.testing.assert_close(found, expected)


def test_linear_moves_before_the_view_that_flattens_for_it() -> None:
    """linear(view(x)) becomes view(linear(x)), on a graph that still has its linear."""
    x = torch.arange(24.0).view(4, 6) / 10
    program = flat_program(flattened_linear, x)
    passes.products_to_linear(program.graph)
    assert passes.products_before_view(program.graph) == 1
    program.graph.lint()
    program.graph_module.recompile()
    linear = next(n for n in program.graph.nodes if n.target is aten.linear.default)
    assert linear.meta["val"].shape == (2, 2, 3)
    assert torch.equal(program.module()(x), flattened_linear(x))


def test_an_activation_is_computed_again_and_not_kept() -> None:
    """Else it would be the largest value that waits for the backward pass."""
    program = flat_program(
        lambda x: functional.gelu(x) * functional.gelu(x) * torch.exp(x) * torch.exp(x),
        torch.ones(4, 6),
    )
    assert passes.share_common_subexpressions(program.graph) == 1
    left = targets(program)
    assert (left.count(aten.gelu.default), left.count(aten.exp.default)) == (2, 1)


LONG = torch.randn(5, 24, generator=torch.Generator().manual_seed(4))


def long_sums(x: Tensor) -> Tensor:
    """Forward with a bias and the backward product, as they are traced: one matrix, twice."""
    y = functional.linear((x * 2.0).view(1, -1, 24), LONG, LONG[:, 0].clone())
    return torch.mm(y.view(-1, 5), LONG)


def test_long_sums_by_a_frozen_matrix_become_short_ones() -> None:
    """Four runs of six; the backward pass reads the transposed matrix, the only one left."""
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(5))
    module = make_fx(long_sums, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
    passes.run_passes(module)
    expected = module(x)
    assert passes.split_long_sums(module, longest=7) == 2
    module.graph.lint()
    module.recompile()
    torch.testing.assert_close(module(x), expected)
    products = [node for node in module.graph.nodes if node.target is PRODUCT]
    assert [product.args[1].meta["val"].shape for product in products] == [(4, 6, 5)]
    (backward,) = [n for n in module.graph.nodes if n.target is aten.linear.default]
    assert torch.equal(getattr(module, backward.args[1].target), LONG.T)
    assert passes.split_long_sums(module, longest=7) == 0


@pytest.mark.parametrize(
    ("width", "found"), [(96, 1), (97, 1), (192, 2), (576, 6), (1536, 16), (100, 2), (388, 1)]
)
def test_pieces_are_equal_and_not_too_many(width: int, found: int) -> None:
    """A width that only divides into far more pieces than needed stays whole."""
    assert passes.pieces(width, longest=96) == found


def test_size_known_at_run_time_is_inferred() -> None:
    """One unknown size of a view becomes -1, and other sizes still run."""
    program = flat_program(lambda x: x.view(x.shape[0], 2, 3) * 1.0, torch.ones(5, 6), dynamic=True)
    assert passes.infer_one_size(program.graph) == 1
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    (view,) = [n for n in program.graph.nodes if n.target is aten.view.default]
    assert view.args[1] == [-1, 2, 3]


RANDOM = torch.Generator().manual_seed(1)
X = torch.randn(5, 7, generator=RANDOM)
GRAD = torch.randn(5, 7, generator=RANDOM)
WEIGHT, BIAS = torch.randn(7, generator=RANDOM), torch.randn(7, generator=RANDOM)
EDGES = torch.tensor([-40.0, -9.0, -1.5, -1e-6, 0.0, 1e-30, 1e-6, 0.3, 9.0, 40.0])
_, MEAN, RSTD = aten.native_layer_norm(X, [7], WEIGHT, BIAS, 1e-12)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (aten.native_layer_norm.default, (X, [7], WEIGHT, BIAS, 1e-12)),
        (
            aten.native_layer_norm_backward.default,
            (GRAD, X, [7], MEAN, RSTD, WEIGHT, BIAS, [True, False, False]),
        ),
        (
            aten._softmax_backward_data.default,
            (GRAD, torch.softmax(X, -1), -1, torch.float32),
        ),
        (aten.native_layer_norm.default, (X, [7], None, None, 1e-5)),
        (aten.gelu_backward.default, (torch.ones(10), EDGES)),
        (partial(aten.gelu.default, approximate="tanh"), (EDGES,)),
        (partial(aten.gelu_backward.default, approximate="tanh"), (torch.ones(10), EDGES)),
        (aten.silu.default, (EDGES,)),
        (aten.silu_backward.default, (torch.ones(10), EDGES)),
        (aten.sigmoid_backward.default, (GRAD, torch.sigmoid(X))),
        (aten.tanh_backward.default, (GRAD, torch.tanh(X))),
        (aten.threshold_backward.default, (torch.ones(10), EDGES.relu(), 0)),
        (aten.pow.Tensor_Scalar, (X, 2)),
        (aten.pow.Tensor_Scalar, (X, 3)),
        (aten.pow.Tensor_Scalar, (X.abs(), 0.5)),
        (aten.pow.Tensor_Scalar, (X.abs(), -0.5)),
        (aten._fused_rms_norm.default, (X, [7], WEIGHT, 1e-6)),
        (aten._fused_rms_norm.default, (X, [7], None, None)),
        (aten.mean.dim, (X, [-1], True)),
        (aten.slice_backward.default, (GRAD, [5, 9], 1, 1, 8, 1)),
        (aten.select_backward.default, (GRAD, [5, 3, 7], 1, -1)),
        (aten.split_with_sizes.default, (X, [2, 5], 1)),
        (aten.split.Tensor, (X, 3, 1)),
        (aten.sum.dim_IntList, (X, [-1])),
        (aten.sum.dim_IntList, (X, [1], True)),
    ],
    ids=str,
)
def test_decomposition_equals_the_operator(operator: Any, arguments: tuple[Any, ...]) -> None:  # noqa: ANN401  an overload
    """To float32 rounding, at the edges too: gelu at 0, tiny and large arguments."""
    overload, options = getattr(operator, "func", operator), getattr(operator, "keywords", {})
    expected = operator(*arguments)
    found = DECOMPOSITIONS[overload](*arguments, **options)
    pairs = (
        [(expected, found)] if isinstance(expected, Tensor) else zip(expected, found, strict=True)
    )
    for right, ours in pairs:
        if ours is not None:
            torch.testing.assert_close(ours, right, rtol=2e-6, atol=1e-6)


def test_uncovered_cases_are_left_as_they_are() -> None:
    """A decomposition that does not apply says so, and the operator stays."""
    assert DECOMPOSITIONS[aten.sum.dim_IntList](X, [0]) is NotImplemented
    assert DECOMPOSITIONS[aten.mean.dim](X, [0]) is NotImplemented
    assert DECOMPOSITIONS[aten.gelu.default](X) is NotImplemented
    assert DECOMPOSITIONS[aten.pow.Tensor_Scalar](X, 1.5) is NotImplemented
    assert DECOMPOSITIONS[aten.threshold_backward.default](X, X, 0.5) is NotImplemented
    assert DECOMPOSITIONS[aten.slice_backward.default](X, [5, 14], 1, 0, 14, 2) is NotImplemented
