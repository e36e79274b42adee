"""The chunked loss equals the plain one, and never makes the full logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rynnvla_jax.config import MeshConfig
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.models.losses import chunked_cross_entropy


def inputs(B=3, S=37, D=16, V=50, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    return (
        jax.random.normal(keys[0], (B, S, D)),
        jax.random.normal(keys[1], (D, V)),
        jax.random.randint(keys[2], (B, S), 0, V - 5),
        jax.random.bernoulli(keys[3], 0.6, (B, S)).astype(jnp.float32),
        jnp.arange(V) < V - 5,
    )


def plain(hidden, head, targets, weights, allowed):
    logits = jnp.where(allowed, hidden @ head, -jnp.inf)
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    correct = (jnp.argmax(logits, -1) == targets) * weights
    return jnp.sum(weights * (log_partition - target)), jnp.sum(weights * log_partition**2), correct.sum()


@pytest.mark.parametrize("chunk", [1, 8, 37, 64])
def test_equals_plain_loss_and_gradients(chunk):
    hidden, head, *rest = inputs()

    def total(f, hidden, head):
        ce, z, *_ = f(hidden, head)
        return ce + 0.1 * z

    ours = lambda h, w: chunked_cross_entropy(h, w, *rest, chunk)  # noqa: E731
    theirs = lambda h, w: plain(h, w, *rest)  # noqa: E731
    sums = jax.jit(ours)(hidden, head)[:3]  # tests/train/test_observed.py has the losses of single tokens
    np.testing.assert_allclose(sums, jax.jit(theirs)(hidden, head), rtol=1e-5)
    a, b = (jax.jit(jax.grad(lambda h, w, f=f: total(f, h, w), (0, 1)))(hidden, head) for f in (ours, theirs))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), a, b)


def inner_jaxprs(equation):
    for value in equation.params.values():
        for inner in value if isinstance(value, (tuple, list)) else [value]:
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield inner


def largest_array(jaxpr) -> int:
    """Elements of the largest intermediate of a jaxpr, inner ones included."""
    largest = 0
    for equation in jaxpr.eqns:
        largest = max([largest, *(v.aval.size for v in equation.outvars)])
        largest = max([largest, *map(largest_array, inner_jaxprs(equation))])
    return largest


def products(jaxpr, times=1) -> list[tuple]:
    """The shapes of all matrix products that one device runs, each as often as the loops around it turn."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found += [equation.outvars[0].aval.shape] * times
        assert equation.primitive.name != "while", "a loop whose turns are not in the jaxpr"
        for inner in inner_jaxprs(equation):
            found += products(inner, times * equation.params.get("length", 1))
    return found


def test_full_logits_never_exist():
    B, S, D, V = 2, 256, 16, 1000
    hidden, head, *rest = inputs(B, S, D, V)
    f = jax.grad(lambda h, w, chunk: chunked_cross_entropy(h, w, *rest, chunk)[0], (0, 1))
    assert largest_array(jax.make_jaxpr(f, static_argnums=2)(hidden, head, 100).jaxpr) <= B * S * 128
    assert largest_array(jax.make_jaxpr(f, static_argnums=2)(hidden, head, V).jaxpr) >= B * S * V


def test_padding_rows_get_no_gradient():
    hidden, head, *rest = inputs()
    grad = jax.jit(jax.grad(lambda w: chunked_cross_entropy(hidden, w, *rest, 8)[0]))(head)
    assert np.all(np.asarray(grad[:, -5:]) == 0)


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=2), MeshConfig(fsdp=8), MeshConfig(fsdp=4, sequence=2)])
def test_products_are_as_many_and_as_large_on_any_number_of_devices(mesh):
    devices = jax.devices()[: mesh.fsdp * mesh.sequence]
    hidden, head, *rest = inputs(B=2 * mesh.fsdp, S=64 * mesh.sequence, D=16, V=1000)
    f = jax.grad(lambda h, w: chunked_cross_entropy(h, w, *rest, 250)[0], (0, 1))
    with jax.set_mesh(mesh_lib.make_mesh(mesh, devices)):
        found = products(jax.make_jaxpr(f)(hidden, head).jaxpr)
    logits, rows, piece = (128, 256), (128, 16), (16, 256)
    assert sorted(found) == sorted(4 * [logits, logits, rows, piece])
