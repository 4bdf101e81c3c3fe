import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.errors import RequestError
from dapo_megatron.monitoring import MetricsFile, read_metrics, truncate_after


@given(values=st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False, allow_infinity=False), max_size=4))
def test_floats_come_back_exactly(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    MetricsFile(path).append(values)
    assert read_metrics(path) == [values]


def test_a_line_is_readable_as_soon_as_it_is_appended(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    metrics = MetricsFile(path)
    assert read_metrics(path) == []
    for step in range(3):
        metrics.append({"step": step})
        assert read_metrics(path) == [{"step": i} for i in range(step + 1)]


def test_what_json_cannot_hold_becomes_null_and_arrays_become_lists(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).append(
        {
            "nan": math.nan,
            "inf": -math.inf,
            "float32": np.float32(0.5),
            "int64": np.int64(7),
            "numpy_nan": np.float64("nan"),
            "array": np.array([1.0, np.inf]),
            "nested": {"deep": [math.inf, 1]},
        }
    )
    line = path.read_text()
    # a strict reader takes the line as well
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in the file"))
    assert strict == {
        "nan": None,
        "inf": None,
        "float32": 0.5,
        "int64": 7,
        "numpy_nan": None,
        "array": [1.0, None],
        "nested": {"deep": [None, 1]},
    }


@pytest.mark.parametrize("cut", [b'{"step": 3, "acc', b'{"step": 3', b'{"text": "\xc3', b"{", b"\x00\x00\x00"])
def test_a_last_line_cut_in_the_middle_is_left_out_and_then_overwritten(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + cut)
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    MetricsFile(path).append({"step": 3})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    MetricsFile(path).append({"step": 3})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


@pytest.mark.parametrize("broken", ["{oops", "[1, 2]", "17", '"text"'])
def test_a_broken_line_before_the_last_is_named(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
    with pytest.raises(RequestError, match=r"metrics\.jsonl line 2 is not a JSON object"):
        read_metrics(path)


def test_a_missing_file_is_a_request_error(tmp_path):
    with pytest.raises(RequestError, match=r"absent\.jsonl cannot be read"):
        read_metrics(tmp_path / "absent.jsonl")


def test_truncate_keeps_earlier_lines_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1,"x":0.10}\n{"note":"no step"}\n{"step": 2}\n{"step": 3}\n{"step": 4, "cu')
    truncate_after(path, 2)
    assert path.read_bytes() == b'{"step":1,"x":0.10}\n{"note":"no step"}\n{"step": 2}\n'
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_by_another_key(tmp_path):
    path = tmp_path / "supervised.jsonl"
    path.write_text('{"supervised_step": 1}\n{"supervised_step": 2}\n')
    truncate_after(path, 1, key="supervised_step")
    assert read_metrics(path) == [{"supervised_step": 1}]


def test_truncate_between_two_appends_of_one_writer(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    for step in (1, 2, 3):
        metrics.append({"step": step})
    truncate_after(path, 1)
    metrics.append({"step": 2, "again": True})
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "again": True}]


def test_truncate_of_a_missing_file_does_nothing(tmp_path):
    truncate_after(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []
