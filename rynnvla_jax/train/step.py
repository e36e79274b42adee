"""The update of a stage and its state; `train/loop.py` runs it and `aot/compile.py` compiles it."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rynnvla_jax.config import TrainConfig
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.distributed.mesh import path_string
from rynnvla_jax.models import params as params_lib
from rynnvla_jax.train import compiler_options, finetune
from rynnvla_jax.train.optimizer import check_patterns, make_optimizer, schedule
from rynnvla_jax.train.stages import Frozen, Objective

LAYER_PARTS = 8  # of a stack of layers, in `group_norms`
CODE_STD = 0.2  # of the embeddings of `like_codebook`


@dataclass(frozen=True)
class TrainState:
    """The content of a checkpoint: arrays, or their `jax.ShapeDtypeStruct` with shardings."""

    params: dict[str, Any]
    opt_state: Any
    step: int


class Now(NamedTuple):
    """What differs between steps, and between runs that differ only in the seed and the learning rate: arguments of
    the step's program, so that such runs share it."""

    key: Any  # random key of the step; like `rate` an array, or its shape
    rate: Any  # float32 scalar: its learning rate


def abstract_state(
    config: TrainConfig, objective: Objective, mesh: jax.sharding.Mesh
) -> tuple[TrainState, nnx.GraphDef, optax.GradientTransformationExtraArgs]:
    """Shapes, dtypes and shardings of a stage's state (of what trains), without allocating it. The graph definition is
    the whole model's.

    Raises:
      ConfigError: a dimension that the mesh does not divide, or a pattern that fits no parameter.
    """
    graphdef, params, _, axes = finetune.abstract_params(config, objective, mesh)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    check_patterns(config.optimizer, shapes)
    optimizer = make_optimizer(config.optimizer, config.total_steps, objective.untrained, axes)
    opt_shapes = jax.eval_shape(optimizer.init, shapes)
    opt_shardings = state_shardings(opt_shapes, shapes, shardings, mesh, config.optimizer.offload)

    opt_state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), opt_shapes, opt_shardings)
    return TrainState(params, opt_state, 0), graphdef, optimizer


def state_shardings(opt_shapes: Any, shapes: Any, shardings: Any, mesh: jax.sharding.Mesh, offload: bool) -> Any:
    """A tree of NamedSharding for an optimizer's state: what belongs to a parameter is cut as the parameter is.

    A part of the state belongs to a parameter when its path ends with the parameter's. Adafactor's factored moments
    lack one of the parameter's two largest axes; all else is whole on every device.

    Args:
      offload: what belongs to a parameter is kept on the hosts.
    """
    known = {path_string(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(shapes)}
    placed = {path_string(path): s for path, s in jax.tree_util.tree_leaves_with_path(shardings)}

    def one(path, x):
        keys = list(itertools.takewhile(lambda key: isinstance(key, jax.tree_util.DictKey), reversed(path)))
        name = path_string(tuple(reversed(keys)))
        shape = known.get(name)
        if shape is None or not x.ndim:
            return mesh_lib.replicated(mesh)
        if x.shape == shape:
            sharding = placed[name]
        else:
            largest = np.argsort(shape)[-2:]  # as optax chooses them: rows lack the last, columns the one before
            kind = str(path[-1 - len(keys)]).lstrip(".")
            axis = int({"v_row": largest[-1], "v_col": largest[0]}.get(kind, -1)) if len(largest) == 2 else -1
            if axis < 0 or x.shape != (*shape[:axis], *shape[axis + 1 :]):
                return mesh_lib.replicated(mesh)  # the stand-in of one number for a moment that is kept in another way
            sharding = mesh_lib.without_axis(placed[name], axis)
        return mesh_lib.on_host(sharding) if offload else sharding

    return jax.tree_util.tree_map_with_path(one, opt_shapes)


def fresh_state(
    config: TrainConfig,
    objective: Objective,
    abstract: TrainState,
    optimizer: optax.GradientTransformation,
    loaded: dict[str, Any],
    frozen: Frozen,
) -> TrainState:
    """Step 0: `loaded` parameters, the others randomly initialised; every array is created directly sharded."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract.params)

    def draw(seeded):
        rngs = nnx.Rngs(jax.random.wrap_key_data(seeded))
        drawn = params_lib.split(objective.build(config, rngs))[1]
        return without(finetune.split(config.finetune, drawn)[0], loaded)

    # Only the new parameters are initialised: the compiler drops the rest, so no array exists twice.
    drawn = jax.jit(draw, out_shardings=without(shardings, loaded))(key_data(config.seed))
    params = merged(abstract.params, drawn, loaded)
    if config.codes_like_codebook:
        params = like_codebook(params, frozen, config.seed)
    opt_shardings = jax.tree.map(lambda x: x.sharding, abstract.opt_state)
    return TrainState(params, jax.jit(optimizer.init, out_shardings=opt_shardings)(params), 0)


def like_codebook(params: dict[str, Any], frozen: Frozen, seed: int) -> dict[str, Any]:
    """`params` whose embeddings of image tokens are the VQGAN's codebook, standardised and randomly projected.

    Codes for similar pixels then start with similar embeddings; with independent ones, what the model learns about one
    code does not help with its neighbours. Ten times the norm of random ones, so the first updates do not erase it.
    """
    book = frozen.vqgan["codebook"]
    size = book.shape[1]

    def start(table, book, code_to_token, seeded):
        key = jax.random.wrap_key_data(seeded)
        book = (book - book.mean(0)) / (book.std(0) + 1e-6)
        projection = jax.random.normal(key, (size, table.shape[1])) * CODE_STD * size**-0.5
        return table.at[code_to_token].set((book @ projection).astype(table.dtype))

    transformer = params["transformer"]
    table = transformer["embed"]
    table = jax.jit(start, out_shardings=table.sharding)(table, book, frozen.code_to_token, key_data(seed))
    return {**params, "transformer": {**transformer, "embed": table}}


def key_data(seed: int) -> np.ndarray:
    """uint32: the data of `jax.random.key(seed)`, as an argument of programs, which then do not depend on the seed."""
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


def with_counts(opt_state: Any, change: int) -> Any:
    """The optimizer state with other step counts (its only integers)."""
    return jax.tree.map(lambda x: x + change if change and jnp.issubdtype(x.dtype, jnp.integer) else x, opt_state)


def without(tree: dict[str, Any], drop: dict[str, Any]) -> dict[str, Any]:
    """`tree` without the leaves that are in `drop`."""
    return {
        k: without(v, drop.get(k, {})) if isinstance(v, dict) else v
        for k, v in tree.items()
        if isinstance(v, dict) or k not in drop
    }


def merged(tree: dict[str, Any], *sources: dict[str, Any]) -> dict[str, Any]:
    """A tree of the shape of `tree`, every leaf from the one source that has it."""
    return {
        k: merged(v, *(s.get(k, {}) for s in sources)) if isinstance(v, dict) else next(s[k] for s in sources if k in s)
        for k, v in tree.items()
    }


def make_now(config: TrainConfig, mesh: jax.sharding.Mesh) -> Callable[[Any], Now]:
    """A small program of its own: number of a step (from 0 on) -> its key and learning rate, on every device."""
    rate = schedule(config.optimizer, config.total_steps)

    def now(seeded, step):
        return Now(jax.random.fold_in(jax.random.wrap_key_data(seeded), step), jnp.asarray(rate(step), jnp.float32))

    return functools.partial(jax.jit(now, out_shardings=mesh_lib.replicated(mesh)), key_data(config.seed))


def abstract_now(mesh: jax.sharding.Mesh) -> Now:
    """Shapes of `Now`."""
    whole, key = mesh_lib.replicated(mesh), jax.eval_shape(lambda: jax.random.key(0))
    return Now(
        jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole),
        jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
    )


def make_step(config: TrainConfig, objective: Objective, graphdef: nnx.GraphDef, optimizer, abstract: TrainState):
    """The jitted update: (params, opt_state, now, frozen, batch) -> (params, opt_state, metrics).

    A loss or gradient that is not finite leaves params and moments as they were and sets `metrics["skipped"]` to 1;
    the optimizer's step counts go on, as those of the run do.
    """
    shardings = jax.tree.map(lambda x: x.sharding, (abstract.params, abstract.opt_state))

    def update(params, opt_state, now, frozen, batch):
        grads, metrics = gradients(config, objective, graphdef, params, frozen, batch, now.key)
        # Gradients go to the shards of their parameters, so that all that follows works on shards only.
        grads = jax.lax.with_sharding_constraint(grads, shardings[0])
        # Without the barrier the compiler changes layouts of the moments early, and keeps the copies all the while.
        grads, params, opt_state = jax.lax.optimization_barrier((grads, params, opt_state))
        if config.optimizer.offload:  # to the devices; the results go back by `out_shardings`
            opt_state = jax.device_put(opt_state, jax.tree.map(lambda s: s.with_memory_kind("device"), shardings[1]))
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        metrics |= {"grad_norm": norm, "learning_rate": now.rate, "skipped": 1.0 - finite}
        metrics |= group_norms(grads) if config.gradient_norms else {}
        updates, new_opt_state = optimizer.update(grads, opt_state, params, rate=now.rate)
        new = optax.apply_updates(params, updates), new_opt_state
        # Scalars are the optimizer's step counts, which go on.
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b) if a.ndim else a, new, (params, opt_state))
        return *kept, metrics

    device = jax.tree.leaves(shardings)[0].mesh.devices.flat[0]
    return jax.jit(
        update,
        donate_argnums=(0, 1),  # new params and moments take the memory of the old ones
        out_shardings=(*shardings, None),
        compiler_options=compiler_options.options(config, device) or None,
    )


def gradients(config: TrainConfig, objective: Objective, graphdef: nnx.GraphDef, params, frozen: Frozen, batch, key):
    """Gradient and metrics of a whole batch, computed in `optimizer.accumulation` micro-batches.

    A mean over nothing, such as the loss of text where no text is trained, is NaN.

    Losses are divided by the counts of the whole batch, so micro-batches add up to the exact mean.
    """
    counts = objective.counts(batch)

    def loss(params, micro, key):
        model = nnx.merge(graphdef, params_lib.joined(params, frozen.base))
        total, metrics = objective.loss(model, frozen, micro, counts, key, config)
        return total, {"loss": total, **metrics}

    grad = jax.grad(loss, has_aux=True)
    parts = config.optimizer.accumulation
    if parts == 1:
        return divided(*grad(params, batch, key))

    def cut(x):  # every shard keeps its own rows
        x = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
        return mesh_lib.constrain(x, None, "batch", *[None] * (x.ndim - 2))

    def body(total, piece):
        micro, index = piece
        # One key per micro-batch: with the same key, dropout would be the same in all of them.
        return jax.tree.map(jnp.add, total, grad(params, micro, jax.random.fold_in(key, index))), None

    micro = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], micro), key)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return divided(*jax.lax.scan(body, zero, (micro, jnp.arange(parts)))[0])


def divided(grads: Any, metrics: dict[str, Any]) -> tuple[Any, dict[str, jax.Array]]:
    """Gradients, and metrics in which the (sum, count) of `metrics["parts"]` have become means."""
    means = {name: part[0] / part[1] for name, part in metrics.get("parts", {}).items()}
    return grads, {name: x for name, x in metrics.items() if name != "parts"} | means


def group_norms(grads: dict[str, Any]) -> dict[str, jax.Array]:
    """The gradient's norm by top-level group of parameters, those of "transformer" one level deeper; stacked layers in
    up to LAYER_PARTS parts of neighbours, by their numbers."""
    squares: dict[str, jax.Array] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(grads):
        names = path_string(path).split(".")
        group = names[names[0] == "transformer"]
        if group != "blocks":
            squares[group] = squares.get(group, 0.0) + jnp.sum(x**2)
            continue
        by_layer = jnp.sum(x.reshape(len(x), -1) ** 2, axis=1)
        for part in np.array_split(np.arange(len(x)), min(len(x), LAYER_PARTS)):
            name = f"layers_{part[0]}_{part[-1]}"
            squares[name] = squares.get(name, 0.0) + jnp.sum(by_layer[part[0] : part[-1] + 1])
    return {f"grad_norm/{name}": jnp.sqrt(square) for name, square in squares.items()}
