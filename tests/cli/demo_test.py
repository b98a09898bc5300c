# SPDX-License-Identifier: Apache-2.0
import re

import kvq_jax
from kvq_jax.cli import terminal
from kvq_jax.models import load


def test_demo_measures_what_it_shows(kvq, tiny, monkeypatch):
    # The real model takes minutes to compile; a tiny one goes the same way.
    monkeypatch.setattr(terminal, "load_model", lambda *_, **__: load(tiny))
    result = kvq("demo")
    assert (result.code, result.err) == (0, "")
    for word in ("1. Text", "2. Memory", "3. Quality", "seconds. Next:", "kvq --help"):
        assert word in result.out

    rows = {
        cells[0]: cells[1:]
        for line in result.out.splitlines()
        if len(cells := [x.strip() for x in re.split("[│]", line)[1:-1]]) > 3
    }
    # 3 layers x keys and values x 2 heads x 16 channels x 2 bytes
    assert rows["8,192"][0] == terminal.size(3 * (2 * 2 * 16 * 2 * 8192 + 4))
    method = kvq_jax.ott(group_size=32, residual_length=32)
    state = method.init(kvq_jax.CacheSpec(1, 2, 8192, 16, "bfloat16"))
    assert rows["8,192"][1] == terminal.size(3 * kvq_jax.nbytes(state))
    assert rows["dense"][2:] == ["0.0000 ± 0.0000", "0.000", "100.0%"]
    bits = {name: float(rows[name][0]) for name in ("dense", "kivi", "ott")}
    assert bits["kivi"] < bits["ott"] < bits["dense"]
    assert "640 predictions" in result.out
