"""libtpu describes a pod that this machine does not have. Answers its number of chips."""

from rynnvla_jax.aot.environment import prepare_compiler
from rynnvla_jax.cli.probes import answer

prepare_compiler("v5e:2x2")  # sets variables that JAX reads when it is imported, so before the next import
from rynnvla_jax.aot.pods import pod  # noqa: E402

answer(len(pod("v5e:2x2")))
