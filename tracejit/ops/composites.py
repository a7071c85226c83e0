"""What the composites are: functions built from ops inside a named scope, explained as the ops themselves are.

A composite has no lowering and no gradient of its own, so this is all there is to say of it once its code is written:
category, meaning, formula, shape rule, gradient rule. :func:`op_table` joins these rows to those of the op registry;
compile events carry the result and the viewer's inspector shows it. ``tests/unit/test_op_table.py`` wants a row for
every scope that ``nn`` and ``functions`` open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tracejit.graph import Graph

Row = dict[str, str]

_SAME = "y has x's shape"
_BY_PARTS = "the chain rule through its ops"


def _row(
    category: str, meaning: str, formula: str, shape_rule: str = _SAME, grad_rule: str = _BY_PARTS
) -> Row:
    return {
        "category": category,
        "meaning": meaning,
        "formula": formula,
        "shape_rule": shape_rule,
        "grad_rule": grad_rule,
    }


def _act(meaning: str, formula: str, grad: str) -> Row:
    return _row("activation", meaning, formula, _SAME, grad)


COMPOSITES: dict[str, Row] = {
    # -- activations
    "relu": _act(
        "Passes positive values, cuts negative ones to zero.", "max(x, 0)", "dx = g where x > 0, else 0"
    ),
    "leaky_relu": _act(
        "ReLU with a small slope below zero.", "x if x > 0 else a x", "dx = g where x > 0, else a g"
    ),
    "elu": _act(
        "Smooth below zero, with limit -a.",
        "x if x > 0 else a (exp(x) - 1)",
        "dx = g (1 if x > 0 else a exp(x))",
    ),
    "gelu": _act(
        "Weights a value by the probability that a normal variable is below it.",
        "x Phi(x)",
        "dx = g (Phi(x) + x phi(x))",
    ),
    "silu": _act(
        "A value times its own sigmoid (swish).", "x sigmoid(x)", "dx = g s (1 + x (1 - s)), s = sigmoid(x)"
    ),
    "sigmoid": _act("Squashes to the range 0 to 1.", "1 / (1 + exp(-x))", "dx = g y (1 - y)"),
    "softplus": _act("A smooth ReLU.", "log(1 + exp(b x)) / b", "dx = g sigmoid(b x)"),
    "tanh": _act("Squashes to -1 to 1.", "tanh(x)", "dx = g (1 - y^2)"),
    "softmax": _row(
        "reduction",
        "Turns scores into probabilities: positive, with sum 1.",
        "exp(x - max x) / sum exp(x - max x)",
        _SAME,
        "dx = y (g - sum(g y))",
    ),
    "log_softmax": _row(
        "reduction",
        "Logarithm of the softmax, without its overflow.",
        "x - max x - log sum exp(x - max x)",
        _SAME,
        "dx = g - exp(y) sum(g)",
    ),
    "logsumexp": _row(
        "reduction",
        "A smooth maximum, without overflow.",
        "max x + log sum exp(x - max x)",
        "the axis goes, or stays as 1 with keepdims",
        "dx = g softmax(x)",
    ),
    # -- layers
    "linear": _row(
        "contraction",
        "An affine map: every output is a weighted sum of all inputs.",
        "y = x W + b",
        "(..., in) @ (in, out) -> (..., out)",
        "dx = g W^T, dW = x^T g, db = sum g",
    ),
    "embedding": _row(
        "gather",
        "Looks up one learned vector for each index.",
        "y = W[ids]",
        "(...) -> (..., dim)",
        "dW[ids] += g; the indices have none",
    ),
    "one_hot": _row(
        "gather",
        "A row with a 1 at the index and 0 elsewhere.",
        "y[..., k] = (ids == k)",
        "(...) -> (..., classes)",
        "none: the indices are integers",
    ),
    "dropout": _row(
        "random",
        "Sets a random part of the values to zero and scales up the rest.",
        "x m / (1 - p), m ~ Bernoulli(1 - p)",
        _SAME,
        "dx = g m / (1 - p)",
    ),
    "attention": _row(
        "contraction",
        "Every query takes the mean of the values, weighted by how well their keys match it.",
        "softmax(Q K^T / sqrt(d) + mask) V",
        "(..., q, d), (..., k, d), (..., k, v) -> (..., q, v)",
        "dV = P^T g, dP = g V^T, dS = P (dP - sum(dP P)), dQ = s dS K, dK = s dS^T Q",
    ),
    "qkv": _row(
        "contraction",
        "Queries, keys and values: three linear maps of the same input.",
        "[Q, K, V] = x W + b",
        "(..., d) -> three of (..., heads, d/heads)",
        "dx = g W^T, dW = x^T g, db = sum g",
    ),
    "proj": _row(
        "contraction",
        "Mixes what the attention heads found.",
        "y = concat(heads) W + b",
        "(..., d) -> (..., d)",
        "dx = g W^T, dW = x^T g, db = sum g",
    ),
    "rotary": _row(
        "elementwise",
        "Turns pairs of features by an angle that grows with the position.",
        "(a cos t - b sin t, a sin t + b cos t)",
        _SAME,
        "the same rotation, backwards",
    ),
    "sinusoidal_positions": _row(
        "constant",
        "Sines and cosines of the position at many wavelengths.",
        "sin(p w_i), cos(p w_i)",
        "(length, dim)",
        "none: it depends on no input",
    ),
    "positions": _row(
        "elementwise", "Adds what tells positions apart.", "x + P", _SAME, "dx = g, dP = sum g over the batch"
    ),
    "layer_norm": _row(
        "norm",
        "Gives each row mean 0 and variance 1, then scales and shifts it.",
        "(x - mean x) / sqrt(var x + eps) * w + b",
        _SAME,
        "with h the normalised row, d = g w: dx = (d - mean d - h mean(d h)) / s; dw = sum g h, db = sum g",
    ),
    "rms_norm": _row(
        "norm",
        "Scales each row to root mean square 1.",
        "x / sqrt(mean x^2 + eps) * w",
        _SAME,
        "with h = x / r, d = g w: dx = (d - h mean(d h)) / r; dw = sum g h",
    ),
    "group_norm": _row(
        "norm",
        "Layer norm over groups of channels.",
        "(x - mean_G x) / sqrt(var_G x + eps) * w + b",
        _SAME,
        "as layer_norm, over each group",
    ),
    "conv2d": _row(
        "contraction",
        "Slides learned filters over an image.",
        "y[o, i, j] = sum w[o, c, k, l] x[c, i + k, j + l] + b[o]",
        "(n, c, h, w) -> (n, out, h', w')",
        "dx: correlation with the turned filter; dw: x with g; db = sum g",
    ),
    "max_pool2d": _row(
        "reduction",
        "The largest value of each window.",
        "max over the window",
        "(n, c, h, w) -> (n, c, h', w')",
        "g goes to the place of the maximum",
    ),
    "avg_pool2d": _row(
        "reduction",
        "The mean of each window.",
        "mean over the window",
        "(n, c, h, w) -> (n, c, h', w')",
        "g / window size, to all of the window",
    ),
    # -- losses
    "cross_entropy": _row(
        "loss",
        "How surprised the predicted probabilities are by the labels.",
        "mean(logsumexp(x) - x[label])",
        "(..., classes) and (...) -> scalar",
        "dx = (softmax(x) - onehot(label)) g / rows",
    ),
    "nll_loss": _row(
        "loss",
        "Minus the log-probability of the labels.",
        "-mean(x[label])",
        "(..., classes) and (...) -> scalar",
        "dx = -g / rows at the labels",
    ),
    "binary_cross_entropy_with_logits": _row(
        "loss",
        "Cross-entropy of yes/no answers, from their logits.",
        "mean(max(x, 0) - x t + log(1 + exp(-|x|)))",
        "x and t alike -> scalar",
        "dx = (sigmoid(x) - t) g / size",
    ),
    "mse_loss": _row(
        "loss",
        "Mean of the squared differences.",
        "mean((x - t)^2)",
        "x and t alike -> scalar",
        "dx = 2 (x - t) g / size",
    ),
    "l1_loss": _row(
        "loss",
        "Mean of the absolute differences.",
        "mean(|x - t|)",
        "x and t alike -> scalar",
        "dx = sign(x - t) g / size",
    ),
    "huber_loss": _row(
        "loss",
        "Squared for small differences, linear for large ones.",
        "d^2 / 2 if |d| < c else c (|d| - c / 2)",
        "x and t alike -> scalar",
        "dx = clip(x - t, -c, c) g / size",
    ),
    # -- statistics and NumPy's functions
    "mean": _row(
        "reduction",
        "The average.",
        "sum(x) / n",
        "the reduced axes go, or stay as 1 with keepdims",
        "dx = g / n",
    ),
    "average": _row(
        "reduction", "The weighted average.", "sum(w x) / sum(w)", "the reduced axes go", "dx = g w / sum(w)"
    ),
    "var": _row(
        "reduction",
        "The mean squared distance from the mean.",
        "mean((x - mean x)^2)",
        "the reduced axes go, or stay as 1 with keepdims",
        "dx = 2 g (x - mean x) / n",
    ),
    "std": _row(
        "reduction",
        "The square root of the variance.",
        "sqrt(mean((x - mean x)^2))",
        "the reduced axes go, or stay as 1 with keepdims",
        "dx = g (x - mean x) / (n y)",
    ),
    "cov": _row(
        "contraction",
        "How much every two variables vary together.",
        "(x - mean x)(x - mean x)^T / (n - 1)",
        "(variables, n) -> (variables, variables)",
    ),
    "corrcoef": _row(
        "contraction",
        "The covariance of every two variables, scaled to -1 to 1.",
        "cov(i, j) / sqrt(cov(i, i) cov(j, j))",
        "(variables, n) -> (variables, variables)",
    ),
    "norm": _row(
        "reduction",
        "The length of a vector, or a norm of a matrix.",
        "sqrt(sum |x|^2)",
        "the reduced axes go",
        "dx = g x / y",
    ),
    "sinc": _row("elementwise", "The sampling function.", "sin(pi x) / (pi x), 1 at 0"),
    "nan_to_num": _row(
        "elementwise",
        "Replaces NaN and infinities by numbers.",
        "x if finite else a number",
        _SAME,
        "dx = g where x is finite, else 0",
    ),
    "isclose": _row(
        "elementwise",
        "Whether two values are equal up to a tolerance.",
        "|a - b| <= atol + rtol |b|",
        "a and b broadcast",
        "none: the result is a truth value",
    ),
    "logaddexp": _row(
        "elementwise",
        "Adds probabilities given as logarithms.",
        "log(exp a + exp b)",
        "a and b broadcast",
        "da = g exp(a - y), db = g exp(b - y)",
    ),
    "logaddexp2": _row(
        "elementwise",
        "Adds probabilities given as logarithms to base 2.",
        "log2(2^a + 2^b)",
        "a and b broadcast",
        "da = g 2^(a - y), db = g 2^(b - y)",
    ),
    "hypot": _row(
        "elementwise",
        "The hypotenuse, without overflow.",
        "sqrt(a^2 + b^2)",
        "a and b broadcast",
        "da = g a / y, db = g b / y",
    ),
    "kron": _row(
        "contraction",
        "All products of the elements of two arrays, as blocks.",
        "y[i p + k, j q + l] = a[i, j] b[k, l]",
        "(m, n), (p, q) -> (m p, n q)",
    ),
    "gradient": _row(
        "elementwise",
        "The slope along an axis from neighbouring differences.",
        "(x[i+1] - x[i-1]) / 2 h",
        _SAME,
    ),
    "cross": _row(
        "elementwise",
        "The vector at right angles to two others.",
        "a x b",
        "(..., 3), (..., 3) -> (..., 3)",
        "da = b x g, db = g x a",
    ),
    "convolve": _row(
        "contraction",
        "Slides one sequence, reversed, along another.",
        "y[i] = sum_k a[k] b[i - k]",
        "(m,), (n,) -> (m + n - 1,) when full",
    ),
    "interp": _row(
        "gather", "Reads a curve of straight pieces.", "y0 + (x - x0) (y1 - y0) / (x1 - x0)", _SAME
    ),
    "polyval": _row("elementwise", "The value of a polynomial.", "(c0 x + c1) x + ...", _SAME),
    # -- optimisers
    "optimizer": _row(
        "elementwise",
        "Moves every parameter against its gradient.",
        "p - lr * direction(g, state)",
        "each tensor keeps its shape",
        "none is taken through an update",
    ),
    "schedule": _row(
        "elementwise",
        "The learning rate of this step.",
        "lr(step)",
        "scalar",
        "none is taken through an update",
    ),
    "global_norm": _row(
        "reduction", "The length of all gradients together.", "sqrt(sum over tensors of sum g^2)", "scalar"
    ),
    "clip_by_global_norm": _row(
        "elementwise",
        "Shortens all gradients together to at most a length.",
        "g min(1, c / |g|)",
        "each tensor keeps its shape",
    ),
    "clip_by_value": _row(
        "elementwise", "Cuts each gradient to a range.", "min(max(g, -c), c)", "each tensor keeps its shape"
    ),
}


def op_table(graph: Graph) -> dict[str, Row]:
    """The rows for what occurs in ``graph``: its ops, and, with a slash after their names, its composites."""
    scopes = {part for n in graph.nodes for part in n.scope.split("/")} if graph.nodes else set()
    table = {f"{name}/": COMPOSITES[name] for name in sorted(scopes & COMPOSITES.keys())}
    return table | {n.op.name: n.op.describe() for n in graph.nodes}
