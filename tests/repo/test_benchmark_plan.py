"""The formulas of ``benchmarks/devices.py`` say what compiled programs send and
hold.
"""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def devices(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import devices

    yield devices
    for name in ("devices", "_measure"):
        del sys.modules[name]


@pytest.mark.any_release
@pytest.mark.parametrize("sharded", [False, True])
def test_formulas_agree_with_compiled_programs(devices, sharded):
    found = devices.checks(sharded, devices=[8])
    assert len(found) == len(devices.PRODUCTS) - sharded
    for product, (sent, held) in found:
        assert sent == pytest.approx(1, abs=0.1), product.name
        assert held == pytest.approx(1, abs=0.1), product.name


def test_what_a_loop_sends_counts_as_often_as_it_turns(devices):
    size = devices.Size(1, 1, 1, 1, devices=4, chunk=1)
    text = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.1 = f32[8]{0} all-reduce(%x), channel_id=1
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %while = (s32[], f32[8]{0}) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %all-gather.1 = f32[16]{0} all-gather(%y), channel_id=2
  %reduce-scatter = f32[4]{0} reduce-scatter(%z), channel_id=3
}
"""  # noqa: E501
    assert devices.sent(text, size) == (5 * 2 * 8 + 16 + 16) * 3 / 4
