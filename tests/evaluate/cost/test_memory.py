import pytest

from brixel.evaluate.cost.memory import memory_table, report


@pytest.mark.slow
def test_the_table_is_predicted_without_weights_and_measured_where_asked():
    rows = memory_table(["dinov3-vits16"], [64, 128], measured={"dinov3-vits16": 64})
    assert {(row.kind, row.side_px) for row in rows} == {
        (kind, side_px) for kind in ("whole", "row_chunks") for side_px in (64, 128)
    }
    for row in rows:
        assert (row.measured_bytes is None) == (row.side_px == 128)
        if row.measured_bytes is not None:
            assert 0.9 * row.predicted_bytes <= row.measured_bytes <= row.predicted_bytes
    text = report(rows, "brixel plan --table")
    assert "| dinov3-vits16 | bfloat16 | 128 |" in text
    assert text.endswith("    brixel plan --table")
