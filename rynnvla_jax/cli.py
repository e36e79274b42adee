"""`rynnvla COMMAND ...`: one line a command; each has its own `--help`."""

import sys

COMMANDS = {
    "train": "train any stage: rynnvla train --config configs/robot.py:7b --workdir DIR",
    "convert": "PyTorch weights in and out: import, export, verify",
    "check": "run an exported policy on one observation: latency and ranges",
    "report": "one HTML page about one or several work dirs",
    "demo": "the whole curriculum with tiny models on the embedded data",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: rynnvla COMMAND ...", "", *lines, "", "rynnvla COMMAND --help says more."])


def main(argv: list[str] | None = None) -> int:
    """Imports only what the command needs: an exported policy runs where JAX is not installed."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    command, rest = argv[0], argv[1:]
    if command == "train":
        from absl import app

        from rynnvla_jax import train

        sys.argv = ["rynnvla train", *rest]  # ml_collections reads overrides from sys.argv
        app.run(train.main)
        return 0
    if command == "convert":
        from rynnvla_jax.convert import cli

        return cli.main(rest)
    if command == "check":
        from rynnvla_jax.deploy import policy

        return policy.main(rest)
    if command == "report":
        from rynnvla_jax import report

        return report.main(rest)
    if command == "demo":
        from rynnvla_jax import demo

        return demo.main(rest)
    import difflib

    near = difflib.get_close_matches(command, COMMANDS, n=1)
    print(f"rynnvla: unknown command {command!r}." + (f" Did you mean {near[0]}?" if near else ""), file=sys.stderr)
    print(usage(), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
