"""A short run of `make soak`. Its limits on time and memory need the long one."""

import json

import pytest

from tests import soak


@pytest.mark.slow
def test_honest_clients_get_their_answers_among_hostile_ones(tmp_path, capsys):
    soak.main(["--minutes", "0.3", "--out", str(tmp_path)])
    summary = json.loads(capsys.readouterr().out)
    assert summary["answers"] >= soak.HONEST and summary["health_checks"] > 0
    assert (summary["wrong"], summary["let_in"], summary["exit_status"]) == (0, 0, 0), summary
    assert summary["stderr_lines"] < soak.STDERR_LINES
