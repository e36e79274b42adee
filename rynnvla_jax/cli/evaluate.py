"""`rynnvla evaluate`: the simulator, and policies that it cannot open itself because it imports no JAX."""

from rynnvla_jax.config import ConfigError
from rynnvla_jax.deploy.export_format import PolicyError
from rynnvla_jax.deploy.observation import Acts
from rynnvla_jax.sim import evaluate


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    return evaluate.main(argv, open_workdir)


def open_workdir(policy: str) -> Acts:
    """The newest checkpoint of a work dir of training. Raises PolicyError."""
    from rynnvla_jax.checkpoint.reader import CheckpointError
    from rynnvla_jax.inference.jax_policy import JaxPolicy

    try:
        return JaxPolicy(policy)
    except (CheckpointError, ConfigError) as error:
        raise PolicyError(f"--policy {policy}: {error}; give a work dir of stage trajectory or robot") from error
