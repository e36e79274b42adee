"""A bucket can be used. Answers {"seconds": of the check} or {"refused": sentence}."""

import sys
import time

from rynnvla_jax.cli.probes import answer
from rynnvla_jax.storage import buckets

start = time.monotonic()
try:
    buckets.check(sys.argv[1], write=True)
except buckets.BucketError as error:
    answer({"refused": str(error)})
else:
    answer({"seconds": time.monotonic() - start})
