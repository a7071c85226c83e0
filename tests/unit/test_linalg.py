"""Products, diagonals, triangles and norms agree with NumPy; gradients with finite differences."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit._evaluate import DTYPES, check, check_gradient, gradients, record, run
from tests.unit.test_elementwise import values
from tracejit import functions as F
from tracejit.errors import DTypeError, ShapeError, TracingError, UnsupportedFunctionError
from tracejit.ops.contraction import dot_general

MATMUL = [
    ((3,), (3,)),
    ((2, 3), (3,)),
    ((3,), (3, 4)),
    ((2, 3), (3, 4)),
    ((5, 2, 3), (3, 4)),
    ((2, 3), (5, 3, 4)),
    ((5, 2, 3), (5, 3, 4)),
    ((5, 2, 3), (1, 3, 4)),
    ((1, 2, 3), (5, 3, 4)),
    ((6, 1, 2, 3), (5, 3, 4)),
    ((6, 5, 2, 3), (6, 5, 3, 4)),
    ((3,), (5, 3, 4)),
    ((5, 2, 3), (3,)),
    ((1, 1), (1, 1)),
    ((0, 3), (3, 4)),
    ((2, 0), (0, 4)),
    ((0, 2, 3), (0, 3, 4)),
]


def f64(shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


@pytest.mark.parametrize("first,second", MATMUL)
def test_matmul_shapes(first, second):
    x, y = f64(first), f64(second, 1)
    check(lambda x, y: x @ y, x, y)
    check(np.matmul, x.astype("f4"), y.astype("f4"))
    check_gradient(lambda x, y: x @ y, x, y)


@pytest.mark.parametrize("first", DTYPES)
def test_matmul_and_dot_over_dtypes(first):
    for second in DTYPES:
        for f in (np.matmul, np.dot, np.inner, np.tensordot, np.vdot, np.outer, np.kron):
            b = values(second, (3, 3), 1)
            check(f, values(first, (3, 3)), b)
        check(lambda x, y: np.einsum("ij,jk->ik", x, y), values(first, (2, 3)), values(second, (3, 2)))
        check(lambda x, y: np.einsum("ij,ij->i", x, y), values(first, (2, 3)), values(second, (2, 3)))


def test_matmul_of_an_array_and_a_tensor():
    w = np.arange(6.0).reshape(3, 2)
    check(lambda x: x @ w, f64((4, 3)))
    check(lambda x: w @ x, f64((2, 3)))
    check(lambda x: [[1.0, 2.0]] @ x, f64((2, 3)))


def test_common_products_make_one_node():
    """No transposes or broadcasts where NumPy's layout is the layout of dot_general."""
    for x, y in (((2, 3), (3, 4)), ((5, 2, 3), (3, 4)), ((5, 2, 3), (5, 3, 4)), ((7, 5, 2, 3), (7, 5, 3, 4))):
        _, graph, _ = record(np.matmul, f64(x), f64(y))
        assert [n.op.name for n in graph.nodes if n.inputs] == ["dot_general"]
    _, graph, _ = record(
        lambda q, k: np.einsum("bhqd,bhkd->bhqk", q, k), f64((2, 3, 4, 5)), f64((2, 3, 6, 5))
    )
    assert [n.op.name for n in graph.nodes if n.inputs] == ["dot_general"]


def test_float16_products_accumulate_in_float32():
    x, y = np.full((1, 4000), 0.1, np.float16), np.ones((4000, 1), np.float16)
    (product,) = run(np.matmul, x, y)
    assert product.dtype == np.float16 and abs(float(product[0, 0]) - 399.9) < 0.5


@pytest.mark.parametrize(
    "first,second",
    [
        ((), (2, 3)),
        ((2, 3), ()),
        ((3,), (3,)),
        ((2, 3), (3,)),
        ((2, 3), (3, 4)),
        ((2, 3), (4, 3, 5)),
        ((4, 2, 3), (3,)),
    ],
)
def test_dot(first, second):
    check(np.dot, f64(first), f64(second, 1))
    check_gradient(np.dot, f64(first), f64(second, 1))
    check(lambda x, y: x.dot(y), f64(first), f64(second, 1))


@pytest.mark.parametrize("first,second", [((), (2,)), ((3,), (3,)), ((2, 3), (3,)), ((2, 3), (4, 5, 3))])
def test_inner(first, second):
    check(np.inner, f64(first), f64(second, 1))
    check_gradient(np.inner, f64(first), f64(second, 1))


@pytest.mark.parametrize(
    "axes", [0, 1, 2, ((1, 2), (0, 1)), ((2, 1), (1, 0)), (1, 0), ((-1,), (1,)), ([2], [-2])]
)
def test_tensordot(axes):
    x, y = f64((2, 3, 4)), f64((3, 4, 5), 1)
    if axes == 1 or axes == 0:
        y = f64((4, 2), 1)
    if axes in ((-1, 1),) or axes == ((-1,), (1,)) or axes == ([2], [-2]):
        y = f64((3, 4, 5), 1)
    check(lambda x, y: np.tensordot(x, y, axes), x, y)
    check_gradient(lambda x, y: np.tensordot(x, y, axes), x, y)


def test_vector_products():
    check(np.vdot, f64((2, 3)), f64((3, 2)))
    check(np.outer, f64((2, 3)), f64((4,)))
    check(np.vecdot, f64((5, 3)), f64((3,)))
    check(lambda x, y: np.vecdot(x, y, axis=0), f64((3, 5)), f64((3, 5), 1))  # type: ignore[call-overload]
    check(np.vecdot, f64((4, 1, 3)), f64((5, 3)))
    if hasattr(np, "matvec"):
        check(np.matvec, f64((4, 2, 3)), f64((3,)))
        check(np.vecmat, f64((4, 3)), f64((4, 3, 2)))
    for f in (np.vdot, np.outer, np.vecdot):
        check_gradient(f, f64((3,)), f64((3,), 1))


@pytest.mark.parametrize(
    "first,second", [((2,), (3,)), ((2, 3), (3, 2)), ((2,), (3, 2)), ((2, 3, 1), (2, 2)), ((), (2, 2))]
)
def test_kron(first, second):
    check(np.kron, f64(first), f64(second, 1))
    check_gradient(np.kron, f64(first), f64(second, 1))


EINSUM = [
    ("ij,jk->ik", (2, 3), (3, 4)),
    ("ij,jk", (2, 3), (3, 4)),
    ("ij,jk->ki", (2, 3), (3, 4)),
    ("ij,ij->", (2, 3), (2, 3)),
    ("ij,ij->ij", (2, 3), (2, 3)),
    ("ij,ji->i", (2, 3), (3, 2)),
    ("i,j->ij", (2,), (3,)),
    ("i,j->ji", (2,), (3,)),
    ("i,i", (3,), (3,)),
    ("bij,bjk->bik", (2, 3, 4), (2, 4, 5)),
    ("bij,bjk->ikb", (2, 3, 4), (2, 4, 5)),
    ("...ij,...jk->...ik", (6, 2, 3, 4), (2, 4, 5)),
    ("...ij,jk", (6, 3, 4), (4, 5)),
    ("i...,i...->...", (3, 2), (3, 2)),
    ("ij...,jk...->ik...", (2, 3, 5), (3, 4, 5)),
    ("bhqd,bhkd->bhqk", (2, 3, 4, 5), (2, 3, 6, 5)),
    ("ii->i", (3, 3)),
    ("ii", (3, 3)),
    ("iij->j", (3, 3, 2)),
    ("iii->i", (3, 3, 3)),
    ("ijj,jk->ik", (2, 3, 3), (3, 4)),
    ("ij->ji", (2, 3)),
    ("ij->", (2, 3)),
    ("ij->j", (2, 3)),
    ("ji", (2, 3)),
    ("...j->...", (2, 4, 3)),
    ("...", (2, 3)),
    ("b...a->a...b", (2, 4, 3)),
    ("ij,jk,kl->il", (2, 3), (3, 4), (4, 5)),
    ("ij,jk,kl", (2, 3), (3, 4), (4, 5)),
    ("i,i,i->i", (3,), (3,), (3,)),
    ("i,j,k->kij", (2,), (3,), (4,)),
    ("ab,bc,cd,da->", (2, 3), (3, 4), (4, 5), (5, 2)),
    ("ij,j,jk,...k->...i", (2, 3), (3,), (3, 4), (6, 4)),
    ("ij,jk->ik", (2, 1), (3, 4)),
    ("ij,ij->ij", (2, 1), (2, 3)),
    ("ij,ij->i", (1, 3), (2, 3)),
    ("ij,jk->ik", (2, 0), (0, 4)),
    ("ij,kl->ik", (2, 3), (4, 5)),
    (" i j , j k -> i k ", (2, 3), (3, 4)),
    ("Ab,bc->Ac", (2, 3), (3, 4)),
    (",i->i", (), (3,)),
]


@pytest.mark.parametrize("case", EINSUM, ids=lambda c: c[0])
def test_einsum(case):
    subscripts, *shapes = case
    arrays = [f64(s, i) for i, s in enumerate(shapes)]
    check(lambda *a: np.einsum(subscripts, *a), *arrays, rtol=1e-12)
    check_gradient(lambda *a: np.einsum(subscripts, *a), *arrays)


def test_einsum_sublists_and_keywords():
    x, y = f64((2, 3)), f64((3, 4), 1)
    check(lambda x, y: np.einsum(x, [0, 1], y, [1, 2], [0, 2]), x, y)
    check(lambda x, y: np.einsum(x, [0, 1], y, [1, 2]), x, y)
    check(lambda x, y: np.einsum(x, [..., 1], y, [1, 2], [..., 2]), x, y)
    check(lambda x, y: np.einsum("ij,jk", x, y, optimize=True), x, y)
    check(lambda x, y: np.einsum("ij,jk", x, y, dtype="float64"), x.astype("f4"), y.astype("f4"))
    check(lambda x: np.einsum("ij->i", x), values("bool"))


def test_einsum_contracts_cheap_pairs_first():
    """a(1000×2) b(2×1000) c(1000×2): left to right would build a 1000×1000 matrix."""
    _, graph, _ = record(
        lambda a, b, c: np.einsum("ij,jk,kl->il", a, b, c), f64((1000, 2)), f64((2, 1000)), f64((1000, 2))
    )
    assert max(n.size for n in graph.nodes) <= 2000


@pytest.mark.parametrize(
    "subscripts,shapes,message",
    [
        ("ij,jk->ik", [(2, 3), (4, 5)], "index 'j' has sizes 3 and 4"),
        ("ij,jk->ik", [(2, 3)], "names 2 operands, 1 were given"),
        ("ijk->i", [(2, 3)], "does not fit an operand of 2 dimensions"),
        ("i->i", [(2, 3)], "does not fit"),
        ("ij->ik", [(2, 3)], "output index 'k' is not among the inputs"),
        ("ij->ii", [(2, 3)], "appears twice"),
        ("ii->i", [(2, 3)], "index 'i' has sizes 2 and 3"),
        ("i$->i", [(2, 3)], "no letter"),
        ("...i->i", [(2, 3)], "ellipsis"),
    ],
)
def test_einsum_errors(subscripts, shapes, message):
    with pytest.raises(ShapeError, match=message.replace("$", r"\$")):
        run(lambda *a: np.einsum(subscripts, *a), *map(f64, shapes))
    with pytest.raises(ValueError):
        np.einsum(subscripts, *map(f64, shapes))


@pytest.mark.parametrize("offset", [-4, -2, -1, 0, 1, 2, 3, 9])
@pytest.mark.parametrize(
    "shape,axes",
    [((3, 4), (0, 1)), ((4, 3), (0, 1)), ((3, 3), (1, 0)), ((2, 3, 4), (0, 2)), ((2, 3, 4), (-1, 1))],
)
def test_diagonal_and_trace(shape, axes, offset):
    x = f64(shape)
    check(lambda x: np.diagonal(x, offset, *axes), x)
    check(lambda x: np.trace(x, offset, *axes), x)
    check_gradient(lambda x: np.diagonal(x, offset, *axes), x)


def test_trace_dtypes_and_methods():
    for dtype in ("bool", "int8", "uint8", "float16", "float32"):
        check(np.trace, values(dtype, (3, 3)))
    check(lambda x: x.trace() + x.diagonal(1).sum(), f64((3, 3)))
    check(lambda x: np.diagonal(x), np.zeros((0, 3)))


@pytest.mark.parametrize("k", [-3, -1, 0, 1, 5])
@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 4, 3), (0, 3)])
def test_triangles(shape, k):
    for f in (np.tril, np.triu):
        check(lambda x, f=f: f(x, k), f64(shape))
        check(lambda x, f=f: f(x, k), values("int8", shape))
        check(lambda x, f=f: f(x, k), values("bool", shape))
        check_gradient(lambda x, f=f: f(x, k), f64(shape))


@pytest.mark.parametrize("ord", [None, 0, 1, 2, 3, -1, -2, 0.5, np.inf, -np.inf])
def test_vector_norms(ord):
    x = f64((3, 4)) + 0.01
    for axis in (0, 1, -1):
        for keepdims in (False, True):
            check(lambda x, a=axis, k=keepdims: np.linalg.norm(x, ord, a, k), x)
            check(
                lambda x, a=axis, k=keepdims: np.linalg.vector_norm(
                    x, axis=a, keepdims=k, ord=2 if ord is None else ord
                ),
                x,
            )
    check(lambda x: np.linalg.norm(x, ord), x[0])
    if ord != 0:
        check_gradient(lambda x: np.linalg.norm(x, ord, 1), x)


@pytest.mark.parametrize("ord", [None, "fro", 1, -1, np.inf, -np.inf])
def test_matrix_norms(ord):
    x = f64((2, 3, 4))
    for axis in ((0, 1), (2, 0), (-2, -1)):
        for keepdims in (False, True):
            check(lambda x, a=axis, k=keepdims: np.linalg.norm(x, ord, a, k), x)
    check(lambda x: np.linalg.norm(x, ord), x[0])
    check(lambda x: np.linalg.matrix_norm(x, ord="fro" if ord is None else ord), x)
    check_gradient(lambda x: np.linalg.norm(x, ord, (0, 1)), x)


def test_norms_of_everything_integers_and_zero():
    check(np.linalg.norm, f64((2, 3, 4)))
    check(lambda x: np.linalg.norm(x, None, None, True), f64((2, 3)))
    check(np.linalg.norm, np.array([3, 4]))
    check(np.linalg.vector_norm, f64((2, 3)))
    check(lambda x: np.linalg.vector_norm(x, axis=(0, 2), keepdims=True), f64((2, 3, 4)))
    (g,) = gradients(np.linalg.norm, np.zeros(3))
    np.testing.assert_array_equal(g, np.zeros(3))


def test_other_linalg_functions():
    x = f64((3, 3))
    for n in (0, 1, 2, 3, 7):
        check(lambda x, n=n: np.linalg.matrix_power(x, n), x, rtol=1e-12)
    check(lambda x, y, z: np.linalg.multi_dot([x, y, z]), f64((2, 3)), f64((3, 4)), f64((4,)), rtol=1e-12)
    check(np.linalg.trace, f64((2, 3, 3)))
    check(np.linalg.diagonal, f64((2, 3, 3)))
    check(np.linalg.outer, f64((2,)), f64((3,)))
    check(np.linalg.matmul, x, x)
    check(np.linalg.vecdot, x, x)
    check(np.linalg.tensordot, x, x)
    check(np.linalg.matrix_transpose, x)


def test_errors_speak_of_the_users_operands():
    with pytest.raises(
        ShapeError, match=r"\[matmul\] the last axis of the first operand \(size 3\).*x1: f64\[2,3\]"
    ):
        run(lambda x: x @ x, f64((2, 3)))
    with pytest.raises(ShapeError, match=r"use \* to multiply by a scalar"):
        run(lambda x: x @ 2.0, f64((2, 3)))
    with pytest.raises(ShapeError, match="axis -1 has sizes 2 and 5"):
        run(lambda x, y: x @ y, f64((2, 3, 4)), f64((5, 4, 3)))
    with pytest.raises(ShapeError, match=r"\[dot\] axis 1 of a"):
        run(np.dot, f64((2, 3)), f64((2, 3)))
    with pytest.raises(ShapeError, match="pair up"):
        run(lambda x, y: np.tensordot(x, y, ((0, 1), (0,))), f64((2, 3)), f64((2, 3)))
    with pytest.raises(ShapeError, match="at least two dimensions"):
        run(np.diagonal, f64((3,)))
    with pytest.raises(UnsupportedFunctionError, match="singular values"):
        run(lambda x: np.linalg.norm(x, 2), f64((2, 3)))
    with pytest.raises(UnsupportedFunctionError, match="inverse"):
        run(lambda x: np.linalg.matrix_power(x, -1), f64((3, 3)))
    with pytest.raises(TracingError, match="out="):
        run(lambda x: np.matmul(x, x, out=np.zeros((3, 3))), f64((3, 3)))
    with pytest.raises(UnsupportedFunctionError, match="axes="):
        run(lambda x: np.matmul(x, x, axes=[(0, 1), (0, 1), (0, 1)]), f64((3, 3)))


def test_dot_general_is_strict():
    names = {"lhs_batch": (), "rhs_batch": (), "lhs_contract": (1,), "rhs_contract": (0,)}
    with pytest.raises(DTypeError, match="one dtype"):
        record(lambda x, y: dot_general(x, y, **names), np.ones((2, 2)), np.ones((2, 2), "f4"))
    with pytest.raises(DTypeError, match="integer or float"):
        record(lambda x, y: dot_general(x, y, **names), np.ones((2, 2), bool), np.ones((2, 2), bool))
    with pytest.raises(ShapeError, match="does not match"):
        record(lambda x, y: dot_general(x, y, **names), np.ones((2, 2)), np.ones((3, 2)))


def test_concrete_arrays_stay_numpy():
    x, y = f64((3, 3)), f64((3, 3), 1)
    for name in ("matmul", "dot", "inner", "tensordot", "vdot", "outer", "kron", "vecdot"):
        np.testing.assert_array_equal(getattr(F, name)(x, y), getattr(np, name)(x, y))
    for name in ("trace", "diagonal", "tril", "triu"):
        np.testing.assert_array_equal(getattr(F, name)(x), getattr(np, name)(x))
    assert F.linalg_norm(x) == np.linalg.norm(x)
