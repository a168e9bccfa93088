"""The file of results: appended, never rewritten, and whole after a kill."""

from __future__ import annotations

from kdgraft_bench.records import FILE, Row, append, read_rows


def row(seed=0, accuracy=0.5, method="plain"):
    return Row(
        "torch", "digits", "small", "conv", method, seed, {"accuracy": accuracy}, 1.0, f"runs/small-{method}/seed{seed}"
    )


def test_rows_come_back(tmp_path):
    rows = [row(0), row(1), row(0, method="kd")]
    for one in rows:
        append(tmp_path, one)
    assert list(read_rows(tmp_path).values()) == rows


def test_what_was_written_stays_as_it_is(tmp_path):
    append(tmp_path, row(0))
    before = (tmp_path / FILE).read_bytes()
    append(tmp_path, row(1))
    assert (tmp_path / FILE).read_bytes().startswith(before)


def test_a_run_that_was_made_again_counts_once(tmp_path):
    append(tmp_path, row(accuracy=0.5))
    append(tmp_path, row(accuracy=0.7))
    (found,) = read_rows(tmp_path).values()
    assert found.metrics == {"accuracy": 0.7}


def test_half_a_line_of_a_killed_process_is_left_out(tmp_path):
    append(tmp_path, row(0))
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole + whole[: len(whole) // 2])
    assert len(read_rows(tmp_path)) == 1
    append(tmp_path, row(1))
    assert [key[2] for key in read_rows(tmp_path)] == [0, 1]


def test_no_file_is_no_row(tmp_path):
    assert read_rows(tmp_path) == {}
